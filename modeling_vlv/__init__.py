"""VLV: image captions, and images reconstructed from caption embeddings (Vision-Language-Vision, arXiv 2507.07104)."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .modeling_vlv import FLORENCE_TASK_PROMPT_IDS, VLVConfig, VLVModel, VLVModelOutput
from .modeling_vlv_captioner import VLVForConditionalGeneration
from .processing_vlv import VLVImageProcessor
from .processing_vlv_captioner import VLVProcessor
from .version import __version__

AutoConfig.register("vlv", VLVConfig, exist_ok=True)
AutoModel.register(VLVConfig, VLVModel, exist_ok=True)
AutoModelForImageTextToText.register(VLVConfig, VLVForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(VLVConfig, VLVForConditionalGeneration, exist_ok=True)
AutoImageProcessor.register(VLVConfig, image_processor_classes={"pil": VLVImageProcessor}, exist_ok=True)
AutoProcessor.register(VLVConfig, VLVProcessor, exist_ok=True)
# `save_pretrained` and `push_to_hub` of these also write their code, so that they load where vlv is not installed.
VLVConfig.register_for_auto_class()
VLVModel.register_for_auto_class("AutoModel")
VLVForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
VLVImageProcessor.register_for_auto_class("AutoImageProcessor")
VLVProcessor.register_for_auto_class()

__all__ = [
    "FLORENCE_TASK_PROMPT_IDS",
    "VLVConfig",
    "VLVForConditionalGeneration",
    "VLVImageProcessor",
    "VLVModel",
    "VLVModelOutput",
    "VLVProcessor",
    "__version__",
]
