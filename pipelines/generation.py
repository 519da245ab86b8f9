"""Captions and images of a batch: the calls that commands, trainers and evaluations share."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from vlv import VLVForConditionalGeneration, VLVProcessor

from .pipeline_vlv_reconstruction import VLVReconstructionPipeline


@torch.no_grad()
def generate_captions(
    model: VLVForConditionalGeneration,
    processor: VLVProcessor,
    *,
    pixel_values: torch.Tensor | None = None,
    caption_embeds: torch.Tensor | None = None,
    **generate_kwargs: Any,
) -> list[str]:
    """Captions of one batch, without special tokens and surrounding blanks.

    Args:
        pixel_values: `(B, 3, height, width)`. Or give `caption_embeds`.
        caption_embeds: `(B, Q, d_text)`.
        generate_kwargs: Arguments of `VLVForConditionalGeneration.generate`, such as `max_new_tokens`. Sampling is off
            unless they turn it on.
    """
    given = {"pixel_values": pixel_values, "caption_embeds": caption_embeds}
    inputs: dict[str, Any] = {n: t.to(model.device, model.dtype) for n, t in given.items() if t is not None}
    ids = model.generate(**inputs, **{"do_sample": False, **generate_kwargs})
    return [caption.strip() for caption in processor.batch_decode(ids, skip_special_tokens=True)]


def generate_images(
    pipeline: VLVReconstructionPipeline,
    *,
    image: Sequence[Any] | None = None,
    caption_embeds: torch.Tensor | None = None,
    seeds: Iterable[int],
    **pipeline_kwargs: Any,
) -> torch.Tensor:
    """Reconstructions `(B, 3, height, width)` of one batch, float32 in 0..1 on the CPU.

    Args:
        image: Images of any kind that the pipeline's image processor takes. Or give `caption_embeds`.
        caption_embeds: `(B, N, d_text)`.
        seeds: One for each image. Each image has noise of its own, so it does not depend on the batch that it is in.
        pipeline_kwargs: Arguments of the pipeline's call, such as `num_inference_steps`.
    """
    inputs: dict[str, Any] = {"image": image} if caption_embeds is None else {"caption_embeds": caption_embeds}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(**inputs, generator=generators, output_type="pt", **pipeline_kwargs).images.float().cpu()
