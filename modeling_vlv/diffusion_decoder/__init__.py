"""The frozen diffusion model: one interface, and one file for each family of models."""

from typing import Any

from diffusers import DiffusionPipeline

from ..reference_configs import replacement_hint
from .base import DenoisingOutput, DiffusionDecoder
from .sd import StableDiffusionDecoder

__all__ = ["DenoisingOutput", "DiffusionDecoder", "StableDiffusionDecoder", "load_diffusion_decoder"]


def load_diffusion_decoder(model: str, **kwargs: Any) -> DiffusionDecoder:
    """Loads the frozen diffusion model of a diffusers folder or repo id, by its family.

    Args:
        model: Folder or repo id with a `model_index.json`, as diffusers' `save_pretrained` writes it.
        kwargs: Arguments of the family's `from_pretrained`, such as `dtype`.

    Raises:
        OSError: If there is no diffusers model at `model`.
        ValueError: If the model belongs to a family that is not supported.
    """
    try:
        parts = DiffusionPipeline.load_config(model)
    except OSError as error:
        raise OSError(
            f"the text-to-image model {model} could not be loaded: {error}{replacement_hint(model)}"
        ) from error
    if "unet" not in parts or "vae" not in parts or "text_encoder_2" in parts:
        raise ValueError(
            f"{model} is a {parts.get('_class_name')}; expected a latent diffusion model with a UNet and one text "
            "encoder (Stable Diffusion 1.x or 2.x)"
        )
    return StableDiffusionDecoder.from_pretrained(model, **kwargs)
