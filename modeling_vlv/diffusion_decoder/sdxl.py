"""Stable Diffusion XL: a UNet with two text encoders, which also reads a pooled state and the image's size."""

from typing import ClassVar

import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from .base import Conditioning
from .sd import StableDiffusionDecoder


class StableDiffusionXLDecoder(StableDiffusionDecoder):
    """A frozen Stable Diffusion XL autoencoder and UNet (Podell et al., 2023, arXiv 2307.01952).

    The hidden states before the last layer of both text encoders stand side by side, `(B, N, 768 + 1280)`. The second
    one's projected state at the last position is the pooled conditioning. The UNet also reads the original size, the
    place of the crop and the target size in pixels: the image is a complete one of the size of the latents, as in
    diffusers' pipeline by default.

    Args and errors are those of `StableDiffusionDecoder`.
    """

    family = "sdxl"
    title = "Stable Diffusion XL"
    text_encoders: ClassVar = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    tokenizers = ("tokenizer", "tokenizer_2")
    conditioning_layers = ((-2,), (-2,))
    pooled_conditioning = (1,)
    reconstruction_pipeline = ("pipeline_vlv_pooled_reconstruction", "VLVPooledReconstructionPipeline")

    def added_conditions(self, noisy: torch.Tensor, conditioning: Conditioning) -> dict[str, torch.Tensor]:
        assert conditioning.pooled is not None
        size = [side * self.scale_factor for side in noisy.shape[2:]]
        time_ids = torch.tensor([[*size, 0, 0, *size]] * len(noisy), device=noisy.device)  # (B, 6)
        dtype = self.unet.dtype
        return {"text_embeds": conditioning.pooled.to(dtype), "time_ids": time_ids.to(dtype)}
