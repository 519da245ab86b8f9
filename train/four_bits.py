"""Language models in 4 bits (NF4 of bitsandbytes), for training by LoRA: QLoRA (arXiv 2305.14314)."""

import copy
from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from vlv import VLVForConditionalGeneration, VLVModel
from vlv.language_model import load_language_model

from .lora import require_peft


def load_in_4_bits(
    language_model: str, gguf_file: str | None = None, compute_dtype: torch.dtype = torch.float32
) -> Any:
    """A causal language model whose linear layers, besides its head, are stored in 4 bits; the rest is float32.

    Args:
        compute_dtype: The precision in which its linear layers compute.

    Raises:
        ImportError: If the library `bitsandbytes` is not installed.
        ValueError: If it is a GGUF file, or a model that is quantised already.
    """
    if not is_bitsandbytes_available():
        raise ImportError("load_in_4bit needs the extra vlv[quantization] (pip install bitsandbytes)")
    if gguf_file is not None or language_model.lower().endswith(".gguf"):
        raise ValueError(
            f"load_in_4bit is set, but {gguf_file or language_model} is a GGUF file, whose weights are dequantised; "
            "leave load_in_4bit out, or name the model's own folder or repository"
        )
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
    return load_language_model(language_model, dtype=torch.float32, quantization_config=quantisation)


def add_quantised(encoder: VLVModel, language_model: Any) -> VLVForConditionalGeneration:
    """A captioner of an encoder and a quantised language model, which it holds as it is. The projection is new.

    The configuration is that of the model with dequantised weights, which is what a training saves.

    Raises:
        ImportError: If the library `peft` is not installed.
    """
    require_peft()
    from peft import prepare_model_for_kbit_training

    config = copy.deepcopy(encoder.config)
    config.image_token_id = None  # of another tokenizer
    config.text_config = copy.deepcopy(language_model.config)
    del config.text_config.quantization_config
    with torch.device("meta"):
        model = VLVForConditionalGeneration(config)
    model.model = encoder
    model.language_model = prepare_model_for_kbit_training(language_model, use_gradient_checkpointing=False)
    model.language_projection.to_empty(device="cpu")
    for module in model.language_projection.modules():
        model._init_weights(module)
    model.generation_config = copy.deepcopy(language_model.generation_config)
    return model.eval()
