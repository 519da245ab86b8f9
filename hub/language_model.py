"""The language model of a captioner as a checkpoint of its own, which servers of language models load."""

import os
from pathlib import Path

from vlv.files import set_default_permissions
from vlv.modeling_vlv_captioner import VLVForConditionalGeneration
from vlv.processing_vlv_captioner import VLVProcessor


def export_language_model(
    folder: str | os.PathLike, captioner: VLVForConditionalGeneration, processor: VLVProcessor
) -> Path:
    """Writes the fine-tuned language model and its tokenizer in the layout of transformers.

    `AutoModelForCausalLM` loads it. From the captioner's prefix as `inputs_embeds` it writes the same captions.

    Returns:
        The folder.
    """
    root = Path(folder)
    captioner.language_model.save_pretrained(root)
    captioner.generation_config.save_pretrained(root)
    processor.tokenizer.save_pretrained(root)
    set_default_permissions(*root.glob("*.safetensors"))
    return root
