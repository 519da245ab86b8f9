"""Stable Diffusion XL: a UNet with two text encoders, which also reads a pooled state and the image's size."""

from collections.abc import Mapping
from typing import Any, ClassVar

import diffusers
import torch
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from .base import Conditioning
from .sd import StableDiffusionDecoder

ZEROS = "force_zeros_for_empty_prompt"  # a setting of diffusers' pipeline


class StableDiffusionXLDecoder(StableDiffusionDecoder):
    """A frozen Stable Diffusion XL autoencoder and UNet (Podell et al., 2023, arXiv 2307.01952).

    The hidden states before the last layer of both text encoders stand side by side, `(B, N, 768 + 1280)`. The second
    one's projected state at the last position is the pooled conditioning. The UNet also reads the original size, the
    place of the crop and the target size in pixels: the image is a complete one of the size of the latents, as in
    diffusers' pipeline by default. Guidance steers away from zeros, or with `force_zeros_for_empty_prompt` off from
    the empty prompt.

    Args and errors are those of `StableDiffusionDecoder`.
    """

    family = "sdxl"
    title = "Stable Diffusion XL"
    text_encoders: ClassVar = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    tokenizers = ("tokenizer", "tokenizer_2")
    conditioning_layers = ((-2,), (-2,))
    pooled_conditioning = (1,)
    pipeline_settings: ClassVar = {ZEROS: True}
    reconstruction_pipeline = ("pipeline_vlv_pooled_reconstruction", "VLVPooledReconstructionPipeline")
    modular_blocks = "modular_vlv_sdxl"

    force_zeros_for_empty_prompt = True

    @classmethod
    def from_pretrained(cls, model: str, **kwargs: Any) -> "StableDiffusionXLDecoder":
        decoder = super().from_pretrained(model, **kwargs)
        assert isinstance(decoder, cls)
        decoder.force_zeros_for_empty_prompt = diffusers.DiffusionPipeline.load_config(model).get(ZEROS, True)
        return decoder

    @classmethod
    def pooled_width(cls, denoiser: Any) -> int:
        sizes = denoiser.config
        return sizes.projection_class_embeddings_input_dim - 6 * sizes.addition_time_embed_dim  # 6 sizes and crop ids

    def unconditional(
        self,
        model: nn.Module,
        tokenizers: Mapping[str, Any],
        device: torch.device | str = "cpu",
        num_positions: int | None = None,
    ) -> Conditioning:
        if not self.force_zeros_for_empty_prompt:
            return super().unconditional(model, tokenizers, device, num_positions)
        config: Any = getattr(model, "module", model).config
        pooled_width = sum(config.text_encoder_configs[number].projection_dim for number in config.pooled_conditioning)
        num_positions = num_positions or config.num_query_tokens
        states = torch.zeros(1, num_positions, config.conditioning_dim, device=device)
        return Conditioning(states, torch.zeros(1, pooled_width, device=device))

    def added_conditions(self, noisy: torch.Tensor, conditioning: Conditioning) -> dict[str, torch.Tensor]:
        assert conditioning.pooled is not None
        size = [side * self.scale_factor for side in noisy.shape[2:]]
        time_ids = torch.tensor([[*size, 0, 0, *size]] * len(noisy), device=noisy.device)  # (B, 6)
        dtype = self.unet.dtype
        return {"text_embeds": conditioning.pooled.to(dtype), "time_ids": time_ids.to(dtype)}

    def pipeline_components(self) -> dict[str, Any]:
        return {**super().pipeline_components(), ZEROS: self.force_zeros_for_empty_prompt}
