"""What share of a GPU's peak speed a training uses: the FLOPs of its step, and the peak of its device."""

import copy
from typing import Any

import torch
from transformers.utils import logging

from .hardware import gpu_of_device

logger = logging.get_logger(__name__)

CAPTION_LENGTHS = (32, 128)
"""Tokens at which FLOPs of stage 2 are counted; between and beyond them they are taken to be linear."""


def count_flops(args: Any) -> tuple[tuple[float, float] | None, float | None]:
    """FLOPs of an image and of a token in a forward and backward pass, and the device's peak in FLOP/s.

    Both are None where the device's peak is not known, as on CPUs, or the models cannot be counted, which is logged.

    Args:
        args: The configuration of a stage.
    """
    peak = peak_of(args)
    if peak is None:
        return None, None
    try:
        return flops_by_input(args), peak
    except Exception as error:  # whatever cannot be counted, a training does not end for it
        logger.warning(f"model_flops_utilisation is left out: {error}")
        return None, None


def peak_of(args: Any) -> float | None:
    """Peak FLOP/s of the device in the precision of the training, if it is known."""
    if args.device.type != "cuda":
        return None
    gpu = gpu_of_device(torch.cuda.get_device_name(args.device))
    if gpu is None:
        return None
    half = args.bf16 or args.fp16
    return gpu.peak("bf16" if half else "fp32", "matmul", torch.backends.cuda.matmul.allow_tf32)


def flops_by_input(args: Any) -> tuple[float, float]:
    """FLOPs of an image, and of a token of its padded caption, in a forward and backward pass.

    They are counted on the meta device. What activation checkpointing computes again is not counted: it is no work of
    the model.

    Raises:
        ValueError: If a model is not known.
    """
    from .counting import count_step
    from .meta_models import build_step

    config = copy.copy(args)
    for name in ("activation_checkpointing", "gradient_checkpointing", "diffusion_gradient_checkpointing"):
        setattr(config, name, False)
    for name in ("encoder_activation_checkpointing", "language_model_activation_checkpointing"):
        setattr(config, name, False)
    config.per_device_train_batch_size, config.pad_to_max_length = 1, False

    def count(tokens: int | None) -> int:
        step = build_step(config, caption_tokens=tokens)
        return count_step(step.loss, step.parts, step.models, step.bf16, step.num_labels).total()

    if not hasattr(args, "max_caption_tokens"):
        return float(count(None)), 0.0
    (short, long), (few, many) = CAPTION_LENGTHS, map(count, CAPTION_LENGTHS)
    by_token = (many - few) / (long - short)
    return few - by_token * short, by_token
