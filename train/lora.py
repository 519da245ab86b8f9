"""LoRA for the language model in stage 2."""

import warnings

from vlv import VLVForConditionalGeneration


def add_lora(model: VLVForConditionalGeneration, rank: int) -> None:
    """Adds trainable LoRA layers to all linear layers of the language model, and freezes its other parameters.

    Raises:
        ImportError: If the library `peft` is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("LoRA needs the extra vlv[train] (pip install '.[train]' in its source folder)") from error
    lora_config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():  # peft still reads a property that transformers has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model.language_model = get_peft_model(model.language_model, lora_config)


def merge_lora(model: VLVForConditionalGeneration) -> None:
    """Merges the LoRA layers into the language model, so that it is saved as a plain one."""
    model.language_model = model.language_model.merge_and_unload()
