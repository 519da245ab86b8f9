"""The frozen diffusion model: one interface, and one file for each family of models."""

import os
from collections.abc import Mapping
from typing import Any

import diffusers

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
    "build_diffusion_decoder",
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


def build_diffusion_decoder(
    components: Mapping[str, Any], source: str | os.PathLike = "the text-to-image model", **kwargs: Any
) -> DiffusionDecoder:
    """The frozen diffusion model that the components of a pipeline make; it has their weights, not copies.

    Args:
        components: By their names in diffusers, with the settings that `pipeline_settings` of the family names.
        source: Where they are from, for messages.
        kwargs: Arguments of the family.

    Raises:
        ValueError: If no family fits, or the autoencoder is not of the family's class.
    """
    family = family_of_components(components, source)
    denoiser, vae_class = components[family.denoiser_name()], family.model_classes()["vae"]
    vae = components["vae"]
    if not isinstance(getattr(vae, "_orig_mod", vae), vae_class):
        raise ValueError(
            f"the autoencoder of {source} is a {_library_class(vae)}; expected {vae_class.__name__}, which encodes "
            "images as the denoiser was trained to read them"
        )
    decoder = family(vae, denoiser, components["scheduler"].config, **kwargs)  # type: ignore[call-arg, arg-type]
    for name, default in family.pipeline_settings.items():
        setattr(decoder, name, components.get(name, default))
    return decoder


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
        index = diffusers.DiffusionPipeline.load_config(os.fspath(model), **kwargs)
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
