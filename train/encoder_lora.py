"""LoRA layers in the image encoder, for stage 1."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from vlv import VLVModel

from .lora import ADAPTER, ADAPTER_FILE, PEFT_PREFIX, require_peft

PREFIX = "image_encoder."


def add_encoder_lora(model: VLVModel, rank: int) -> None:
    """Adds trainable LoRA layers to the trainable linear layers of the image encoder, and freezes its parameters.

    The image encoder is Florence-2 or a vision backbone. Query tokens and projector, and a backbone's query decoder,
    stay trainable. The names of the parameters change, and the model stays a `VLVModel`.

    Raises:
        ImportError: If the library `peft` is not installed.
        ValueError: If no linear layer of the image encoder is trainable.
    """
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    targets = [
        name
        for name, module in model.image_encoder.named_modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad
    ]
    if not targets:
        if model.config.query_decoder_config is not None:
            raise ValueError(
                "encoder_lora_rank is for the vision backbone, which is frozen, and the query decoder is trained in "
                "full: set trainable all, or leave encoder_lora_rank out"
            )
        raise ValueError(
            "encoder_lora_rank needs a trainable part of Florence-2: trainable query_decoder, transformer or all"
        )
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    inject_adapter_in_model(config, model.image_encoder, ADAPTER)
    model.image_encoder.peft_config = {ADAPTER: config}  # type: ignore[assignment]


def has_encoder_lora(model: Any) -> bool:
    """Whether the image encoder of a model has LoRA layers."""
    return isinstance(model, VLVModel) and hasattr(model.image_encoder, "peft_config")


def merge_encoder_lora(model: VLVModel) -> None:
    """Merges the LoRA layers into the image encoder, which is a plain one afterwards."""
    for name, layer in _lora_layers(model).items():
        layer.merge()
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, layer.get_base_layer())
    del model.image_encoder.peft_config


def merged_encoder_weights(model: VLVModel, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of the plain model that `merge_encoder_lora` gives. The model itself does not change.

    Args:
        weights: Those of the model with LoRA layers.
    """
    layers, merged = _lora_layers(model), {}
    for name, tensor in weights.items():
        owner, base, last = name.rpartition(".base_layer.")
        if ".lora_" in name:
            continue
        if owner in layers and last == "weight":
            a, b = (weights[f"{owner}.lora_{part}.{ADAPTER}.weight"] for part in "AB")
            tensor = tensor + (b @ a * layers[owner].scaling[ADAPTER]).to(tensor.dtype)
        merged[f"{owner}.{last}" if base else name] = tensor
    return merged


def _lora_layers(model: VLVModel) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def save_encoder_adapter(model: VLVModel, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Writes the LoRA layers in peft's format, for `peft.PeftModel.from_pretrained(image_encoder, folder)`."""
    folder.mkdir(parents=True, exist_ok=True)
    adapter = {
        PEFT_PREFIX + name.removeprefix(PREFIX).replace(f".{ADAPTER}.weight", ".weight"): tensor.detach().cpu()
        for name, tensor in weights.items()
        if ".lora_" in name
    }
    save_file({name: t.contiguous() for name, t in adapter.items()}, folder / ADAPTER_FILE, metadata={"format": "pt"})
    config: Any = model.image_encoder.peft_config[ADAPTER]  # type: ignore[index]
    for_inference, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(folder))
    config.inference_mode = for_inference


def adapted_weights(
    weights: Mapping[str, torch.Tensor], adapter: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The weights to load into a model with LoRA layers: the image encoder's own are frozen, and stay as they are.

    Args:
        weights: Of the plain, merged model.
        adapter: As `save_encoder_adapter` wrote them, under peft's names.
    """
    own = {name: tensor for name, tensor in weights.items() if not name.startswith(PREFIX)}
    for name, tensor in adapter.items():
        own[f"{PREFIX}{name.removeprefix(PEFT_PREFIX).removesuffix('.weight')}.{ADAPTER}.weight"] = tensor
    return own
