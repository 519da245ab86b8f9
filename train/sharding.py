"""What FSDP2 needs: which modules are sharded, complete weights in checkpoints, weights read back into shards."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from vlv.hub.load import holds_only_trained

from .encoder_lora import PREFIX as FLORENCE
from .encoder_lora import has_encoder_lora
from .freezing import trainable_names
from .lora import LANGUAGE_MODEL_PREFIX as LANGUAGE_MODEL
from .lora import has_lora
from .saving import read_weights

DENOISER_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")
"""Modules of a UNet that are gathered one at a time."""


def configure_fsdp(plugin: Any, model: PreTrainedModel, dtype: torch.dtype | None) -> None:
    """Sets which layers of a model FSDP2 gathers one at a time, and in which precision.

    The parameters, which stay float32, are gathered in `dtype`, and gradients are added up in float32. Activations
    keep the precision that autocast gives them. Layers that accelerate's configuration names are kept.
    """
    # No code here changes the outputs of these modules in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    if not plugin.transformer_cls_names_to_wrap:
        plugin.transformer_cls_names_to_wrap = layers_to_shard(model)
    if dtype is not None and plugin.fsdp_version == 2:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )


def layers_to_shard(model: PreTrainedModel) -> list[str]:
    """Class names of a model's layers.

    `_no_split_modules` also has classes that the model has none of, which accelerate refuses, and the class around the
    word embeddings, which accelerate shards by themselves.
    """
    embeddings = model.get_input_embeddings()
    names, around_embeddings = set(), set()
    for module in model.modules():
        name = type(module).__name__
        if name in (model._no_split_modules or ()):
            names.add(name)
            if any(part is embeddings for part in module.modules()):
                around_embeddings.add(name)
    return sorted(names - around_embeddings)


def shard_denoiser(denoiser: nn.Module, blocks: Sequence[str] = DENOISER_BLOCKS) -> None:
    """Shards the frozen parameters of a denoiser over all processes; each block is gathered when it computes.

    Raises:
        ValueError: If there is one process alone.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_world_size() == 1:
        raise ValueError(
            "shard_diffusion_model needs several processes; start with accelerate launch, or leave it out"
        )
    for module in denoiser.modules():
        if type(module).__name__ in blocks:
            fully_shard(module)
    fully_shard(denoiser)


def gather_weights(model: Any) -> dict[str, torch.Tensor]:
    """The complete weights of a sharded model, on the CPU of the first process; tied ones under one name."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    return {name: tensor for name, tensor in weights.items() if name not in (model.all_tied_weights_keys or {})}


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Loads the weights of a folder into a model, sharded or not. The first process reads them for shards.

    Frozen parts that a checkpoint leaves out keep the weights that the model has.

    Raises:
        ValueError: If a weight of the model is not there, or the folder has weights that the model has not.
    """
    if not isinstance(model, FSDPModule):
        weights = read_weights(folder, model)
        _check_names(weights, model, folder)
        model.load_state_dict(weights, strict=False)
        return
    sharded: dict[str, Any] = {}
    if torch.distributed.get_rank() == 0:
        sharded = read_weights(folder, model)
        _check_names(sharded, model, folder)
    # Not strict: tied weights are stored under one of their names.
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(model, sharded, options=options)


def _check_names(weights: Mapping[str, torch.Tensor], model: nn.Module, folder: str | Path) -> None:
    """Raises `ValueError` if a weight that a model needs is not there, or there are weights that it has not."""
    needed = set(model.state_dict())
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    # Of parts with LoRA layers, checkpoints have the merged weights, and the model's own are frozen.
    parts = [LANGUAGE_MODEL] * has_lora(model) + [FLORENCE] * has_encoder_lora(model)
    missing = needed - set(weights) - set(tied)
    missing -= {name for name in missing if name.startswith(tuple(parts)) and ".lora_" not in name}
    if holds_only_trained(Path(folder)):
        missing &= trainable_names(model)
    unexpected = set(weights) - needed
    if missing or unexpected:
        wrong = [*sorted(missing), *sorted(unexpected)][:3]
        raise ValueError(f"the weights of {folder} are not those of this model: {wrong}")


def check_optimiser_state(folder: str | Path, fsdp: bool) -> None:
    """Checks that a checkpoint's optimiser has the format of the engine that goes on from it.

    Raises:
        ValueError: If it was written by FSDP2 and is not read by it, or the reverse.
    """
    written_by_fsdp = (Path(folder) / "optimizer_0").is_dir()
    if written_by_fsdp != fsdp:
        engines = ("FSDP2", "DDP or one process") if written_by_fsdp else ("DDP or one process", "FSDP2")
        raise ValueError(
            f"{folder} was written by {engines[0]}, but this run uses {engines[1]}, which stores its optimiser in "
            "another way; launch the run as before, or start a new run with --model and this checkpoint"
        )


def initialise_fsdp(model: nn.Module) -> None:
    """Makes FSDP2 read which parameters are trainable now, and not at the first forward pass.

    It takes the precision of a layer's gradients from the parameters that are trainable at that moment. A layer that
    is frozen then, and trained later, fails in mixed precision, or adds its gradients up in bfloat16
    (https://github.com/pytorch/pytorch/issues/186998).
    """
    if isinstance(model, FSDPModule):
        model._get_fsdp_state()._lazy_init()
