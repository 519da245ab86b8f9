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
    parts = sorted(name for name, entry in index.items() if isinstance(entry, (list, tuple)) and entry[0] is not None)
    raise ValueError(
        f"{source} is a {index.get('_class_name')} of {', '.join(parts) or 'no components'}; expected a latent "
        f"diffusion model of one of these families: {', '.join(family.title for family in FAMILIES)}"
    )


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
