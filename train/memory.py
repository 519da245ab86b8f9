"""Settings that save memory or time: activation checkpointing, memory format, compilation."""

from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from vlv import VLVForConditionalGeneration, VLVModel
from vlv.diffusion_decoder import DiffusionDecoder

from .stage_config import StageConfig


def enable_activation_checkpointing(model: VLVModel | VLVForConditionalGeneration, args: StageConfig) -> None:
    """Makes the parts of a model that the settings name recompute their activations in the backward pass."""
    encoder = model.model if isinstance(model, VLVForConditionalGeneration) else model
    if args.encoder_activation_checkpointing:
        encoder.activation_checkpointing_enable(args.activation_checkpointing_kwargs)
    if getattr(args, "language_model_activation_checkpointing", False):
        model.language_model.activation_checkpointing_enable(args.activation_checkpointing_kwargs)


def compile_layers(model: nn.Module, device: torch.device, backend: str = "inductor") -> int:
    """Compiles each transformer layer of a model by itself, in place; names of parameters do not change.

    Returns:
        The number of layers.

    Raises:
        ValueError: If nothing can be compiled on `device`.
    """
    check_compiler(device, backend)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.compile(backend=backend)
    return len(layers)


def check_compiler(device: torch.device, backend: str = "inductor", setting: str = "compile_blocks") -> None:
    """Compiles and calls a small function.

    Args:
        setting: That asks for it, for the message.

    Raises:
        ValueError: If that fails, for example because there is no C++ compiler.
    """
    try:
        torch.compile(lambda x: x * 2 + 1, backend=backend)(torch.ones(2, device=device))
    except Exception as error:  # of many libraries
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{setting} does not work on {device}: {reason}; leave it out") from error


def prepare_diffusion_decoder(decoder: DiffusionDecoder, args: Any) -> None:
    """Applies the settings of stage 1 that concern how the frozen diffusion model is stored and computed.

    Raises:
        ValueError: If a setting does not work here.
    """
    if args.diffusion_gradient_checkpointing:
        decoder.enable_gradient_checkpointing()
    if args.channels_last:
        decoder.denoiser.to(memory_format=torch.channels_last)
    if args.compile_blocks:
        check_compiler(args.device)
        decoder.denoiser.compile_repeated_blocks()
    if args.shard_diffusion_model:
        from .sharding import shard_denoiser

        shard_denoiser(decoder.denoiser)
