"""The frozen diffusion model: one interface, and one file for each family of models."""

import os
from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline

from ..reference_configs import replacement_hint
from .base import Conditioning, DenoisingOutput, DiffusionDecoder
from .sd import StableDiffusionDecoder
from .sd3 import StableDiffusion3Decoder
from .sdxl import StableDiffusionXLDecoder

FAMILIES: tuple[type[DiffusionDecoder], ...] = (
    StableDiffusionDecoder,
    StableDiffusionXLDecoder,
    StableDiffusion3Decoder,
)

__all__ = [
    "FAMILIES",
    "Conditioning",
    "DenoisingOutput",
    "DiffusionDecoder",
    "StableDiffusion3Decoder",
    "StableDiffusionDecoder",
    "StableDiffusionXLDecoder",
    "family_of",
    "family_of_components",
    "find_family",
    "load_diffusion_decoder",
]


def find_family(index: Mapping[str, Any], source: str | os.PathLike) -> type[DiffusionDecoder]:
    """The family whose components a `model_index.json` names.

    Args:
        index: Of a text-to-image model, or of a VLV that holds one.
        source: Its folder or repo id, for the message.

    Raises:
        ValueError: If no family fits.
    """
    for family in FAMILIES:
        if family.fits(index):
            return family
    entries = {name: entry for name, entry in index.items() if not name.startswith("_")}
    parts = sorted(name for name, entry in entries.items() if isinstance(entry, (list, tuple)) and any(entry))
    kind = index.get("_class_name") or "model"
    raise ValueError(
        f"{source} is a {kind if isinstance(kind, str) else kind[-1]} of {', '.join(parts) or 'no components'}; "
        f"expected a latent diffusion model of one of these families: {', '.join(f.title for f in FAMILIES)}"
    )


def family_of_components(components: Mapping[str, Any], source: str | os.PathLike) -> type[DiffusionDecoder]:
    """The family that the components of a text-to-image model, by their names in diffusers, belong to.

    Args:
        source: Where they are from, for the message.

    Raises:
        ValueError: If no family fits.
    """
    entries = {name: ("", _library_class(part)) for name, part in components.items() if part is not None}
    return find_family(entries, source)


def _library_class(part: Any) -> str:
    """The name of a component's class in its library, also of one that is compiled, or sharded by FSDP2."""
    bases = type(getattr(part, "_orig_mod", part)).__mro__
    libraries = ("diffusers", "transformers")
    return next((base.__name__ for base in bases if base.__module__.split(".")[0] in libraries), bases[0].__name__)


def family_of(model: str | os.PathLike, **kwargs: Any) -> type[DiffusionDecoder]:
    """The family of a text-to-image model.

    Args:
        model: Folder or repo id with a `model_index.json`, as diffusers' `save_pretrained` writes it.
        kwargs: Arguments of diffusers' `load_config`, such as `revision`.

    Raises:
        OSError: If there is no diffusers model at `model`.
        ValueError: If the model belongs to a family that is not supported.
    """
    try:
        index = DiffusionPipeline.load_config(os.fspath(model), **kwargs)
    except OSError as error:
        hint = replacement_hint(os.fspath(model))
        raise OSError(f"the text-to-image model {model} could not be loaded: {error}{hint}") from error
    return find_family(index, model)


def load_diffusion_decoder(model: str, **kwargs: Any) -> DiffusionDecoder:
    """Loads the frozen diffusion model of a diffusers folder or repo id, by its family.

    Args:
        model: Folder or repo id with a `model_index.json`, as diffusers' `save_pretrained` writes it.
        kwargs: Arguments of the family's `from_pretrained`, such as `dtype`.

    Raises:
        OSError: If there is no diffusers model at `model`.
        ValueError: If the model belongs to a family that is not supported.
    """
    return family_of(model).from_pretrained(model, **kwargs)
