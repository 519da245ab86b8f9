"""VLV: caption images, and see what the captioner understood (Vision-Language-Vision auto-encoder, arXiv 2507.07104)."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from .modeling_vlv import (
    FLORENCE_TASK_PROMPT_IDS,
    VLVConfig,
    VLVForConditionalGeneration,
    VLVModel,
    VLVModelOutput,
)
from .version import __version__

AutoConfig.register("vlv", VLVConfig, exist_ok=True)
AutoModel.register(VLVConfig, VLVModel, exist_ok=True)
AutoModelForImageTextToText.register(VLVConfig, VLVForConditionalGeneration, exist_ok=True)
