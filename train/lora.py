"""LoRA layers in the language model of stage 2."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vlv import VLVForConditionalGeneration

ADAPTER = "default"  # peft's name for the first adapter
ADAPTER_FILE = "adapter_model.safetensors"
LANGUAGE_MODEL_PREFIX = "language_model."
PEFT_PREFIX = "base_model.model."  # of the names in peft's file


def require_peft() -> None:
    """Raises `ImportError`, with what to install, if the library `peft` is missing."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError("LoRA needs the extra vlv[train] (pip install '.[train]' in its source folder)") from error


def add_lora(model: VLVForConditionalGeneration, rank: int) -> None:
    """Adds trainable LoRA layers to all linear layers of the language model, and freezes its other parameters.

    Raises:
        ImportError: If the library `peft` is not installed.
    """
    require_peft()
    from peft import LoraConfig, get_peft_model

    lora_config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():  # peft still reads a property that transformers has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model.language_model = get_peft_model(model.language_model, lora_config)


def is_4bit(model: Any) -> bool:
    """Whether the weights of the language model of a model are stored in 4 bits."""
    return any(map(is_in_4_bits, getattr(model, "language_model", model).parameters()))


def is_in_4_bits(parameter: torch.nn.Parameter) -> bool:
    """Whether a parameter is stored in 4 bits by bitsandbytes."""
    return type(parameter).__name__ == "Params4bit"


def dequantised_weights(
    model: VLVForConditionalGeneration, weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The weights of a model whose language model is in 4 bits, each dequantised, without its quantisation constants.

    Args:
        weights: Those of the model, with LoRA layers or without.
    """
    from bitsandbytes.functional import dequantize_4bit

    plain = dict(weights)
    for name, parameter in model.named_parameters():
        if is_in_4_bits(parameter):
            plain = {key: tensor for key, tensor in plain.items() if not key.startswith(f"{name}.")}
            plain[name] = dequantize_4bit(parameter.data, parameter.quant_state)
    return plain


def has_lora(model: Any) -> bool:
    """Whether the language model of a model has LoRA layers."""
    return hasattr(getattr(model, "language_model", None), "peft_config")


def merge_lora(model: VLVForConditionalGeneration) -> None:
    """Merges the LoRA layers into the language model, which is a plain one afterwards."""
    model.language_model = model.language_model.merge_and_unload()


def merged_weights(model: VLVForConditionalGeneration, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of the plain model that `merge_lora` gives. The model itself does not change.

    Args:
        weights: Those of the model with LoRA layers.
    """
    modules = model.language_model.named_modules()
    layers = {LANGUAGE_MODEL_PREFIX + name: module for name, module in modules if hasattr(module, "scaling")}
    merged: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        owner, _, last = name.rpartition(".base_layer.")
        if ".lora_" in name:
            continue
        if owner in layers and last == "weight":
            layer = layers[owner]
            a, b = (weights[f"{owner}.lora_{part}.{ADAPTER}.weight"] for part in "AB")
            change = b @ a * layer.scaling[ADAPTER]
            tensor = tensor + (change.T if layer.fan_in_fan_out else change).to(tensor.dtype)
        plain = name.removeprefix(LANGUAGE_MODEL_PREFIX).removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
        merged[LANGUAGE_MODEL_PREFIX + plain if name.startswith(LANGUAGE_MODEL_PREFIX) else name] = tensor.cpu()
    return merged


def save_adapter(model: VLVForConditionalGeneration, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Writes the LoRA layers in peft's format, for `PeftModel.from_pretrained(language_model, folder)`."""
    folder.mkdir(parents=True, exist_ok=True)
    adapter = {}
    for name, tensor in weights.items():
        if ".lora_" in name:
            short = name.removeprefix(LANGUAGE_MODEL_PREFIX).replace(f".{ADAPTER}.weight", ".weight")
            adapter[short] = tensor.detach().cpu().contiguous()
    save_file(adapter, folder / ADAPTER_FILE, metadata={"format": "pt"})
    peft_config = model.language_model.peft_config[ADAPTER]
    for_inference, peft_config.inference_mode = peft_config.inference_mode, True
    peft_config.save_pretrained(str(folder))
    peft_config.inference_mode = for_inference


def load_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of LoRA layers that `save_adapter` wrote, under the names that the model has.

    Raises:
        FileNotFoundError: If there are none.
    """
    return {
        f"{LANGUAGE_MODEL_PREFIX}{name.removesuffix('.weight')}.{ADAPTER}.weight": tensor
        for name, tensor in read_adapter(folder).items()
    }


def read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of LoRA layers under peft's names.

    Raises:
        FileNotFoundError: If there are none.
    """
    if not (folder / ADAPTER_FILE).is_file():
        raise FileNotFoundError(f"there is no {ADAPTER_FILE} in {folder}: the checkpoint is not of a LoRA run")
    return load_file(folder / ADAPTER_FILE)
