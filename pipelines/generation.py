"""Generates the captions or the images of one batch, for commands, trainers and evaluations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from vlv import VLVForConditionalGeneration, VLVProcessor

if TYPE_CHECKING:
    from .loading import ReconstructionPipeline


@torch.no_grad()
def generate_captions(
    model: VLVForConditionalGeneration,
    processor: VLVProcessor,
    *,
    pixel_values: torch.Tensor | None = None,
    caption_embeds: torch.Tensor | None = None,
    text: str | Sequence[str] | None = None,
    **generate_kwargs: Any,
) -> list[str]:
    """Captions of one batch, without special tokens and surrounding white space.

    Args:
        pixel_values: `(B, 3, height, width)`. Either this or `caption_embeds` is given.
        caption_embeds: `(B, N, d_text)`.
        text: An instruction, or words that the captions continue: one for all, or one for each.
        generate_kwargs: Arguments of `VLVForConditionalGeneration.generate`, such as `max_new_tokens`. Sampling is off
            unless they turn it on.

    Returns:
        `B` captions, or `B * num_return_sequences`.
    """
    inputs: dict[str, Any] = {"pixel_values": pixel_values, "caption_embeds": caption_embeds}
    inputs = {name: value.to(model.device, model.dtype) for name, value in inputs.items() if value is not None}
    if text:
        count = max(map(len, inputs.values()), default=0)
        prefix = processor(text=[text] * count if isinstance(text, str) else list(text))
        inputs |= {name: value.to(model.device) for name, value in prefix.items()}
    ids = model.generate(**inputs, **{"do_sample": False, **generate_kwargs})
    return [caption.strip() for caption in processor.batch_decode(ids, skip_special_tokens=True)]


def generate_images(
    pipeline: ReconstructionPipeline,
    *,
    image: Sequence[Any] | None = None,
    caption_embeds: torch.Tensor | None = None,
    seeds: Iterable[int],
    **pipeline_kwargs: Any,
) -> torch.Tensor:
    """Reconstructions `(B, 3, height, width)` of one batch, float32 in 0..1 on the CPU.

    Args:
        image: Images of any kind that the pipeline's image processor takes. Either this or `caption_embeds` is given.
        caption_embeds: `(B, N, d_text)`.
        seeds: One for each generated image. Its noise depends on its seed alone, not on the rest of the batch.
        pipeline_kwargs: Arguments of the pipeline's call, such as `num_inference_steps`.
    """
    output = pipeline(
        image,
        caption_embeds,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
        **pipeline_kwargs,
    )
    return output.images.float().cpu()
