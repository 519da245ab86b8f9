"""The reward that stage 3 is compared with: an image is generated from each caption and compared with the original."""

from collections.abc import Sequence
from typing import Any

import torch

from vlv import VLVModel
from vlv.diffusion_decoder import DiffusionDecoder
from vlv.pipelines import DiffusionScorer

from .teacher import assemble_pipeline

STEPS, GUIDANCE = 10, 2.0


class SampledImageScorer(DiffusionScorer):
    """Scores captions by the squared distance of the image's latents from those that are sampled from the caption.

    A caption costs `2 * steps` passes of the denoiser, with guidance. The noise that sampling starts from is that of
    the image's seed, the same for all of its captions. Only the miniature's own decoder is supported.

    Args:
        model, diffusion_decoder, tokenizers, settings: As `DiffusionScorer`.
        steps: Of sampling.
        guidance_scale: Of sampling.
    """

    def __init__(
        self,
        model: VLVModel,
        diffusion_decoder: DiffusionDecoder,
        tokenizers: dict,
        steps: int = STEPS,
        guidance_scale: float = GUIDANCE,
        **settings,
    ):
        super().__init__(model, diffusion_decoder, tokenizers, **settings)
        self.steps, self.guidance_scale = steps, guidance_scale
        parts = diffusion_decoder.pipeline_components()
        self.pipeline = assemble_pipeline(
            parts["vae"], model.text_encoder, parts["unet"], self.tokenizers["tokenizer"], parts["scheduler"]
        )

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "steps": self.steps, "guidance_scale": self.guidance_scale}

    @torch.no_grad()
    def text_losses(
        self, latents: torch.Tensor, texts: Sequence[Sequence[str | None]], seeds: Sequence[int]
    ) -> list[list[float]]:
        latents = latents.to(self.device, torch.float32)
        noise = self.sample_noise(latents.shape[1:], seeds)[:, 0]  # (N, C, h, w)
        rows = [(image, text) for image, own in enumerate(texts) for text in own]
        found: list[float] = []
        for start in range(0, len(rows), self.batch_size):
            images, words = map(list, zip(*rows[start : start + self.batch_size], strict=True))
            sampled = self.pipeline(
                prompt=[text or "" for text in words],
                latents=noise[images],
                num_inference_steps=self.steps,
                guidance_scale=self.guidance_scale,
                output_type="latent",
            ).images
            found += (sampled.float() - latents[images]).square().flatten(1).mean(dim=1).tolist()
        values = iter(found)
        return [[next(values) for _ in own] for own in texts]
