"""VLV: image captions, and images reconstructed from caption embeddings (Vision-Language-Vision, arXiv 2507.07104).

`import vlv` loads neither torch nor transformers: a class is imported when it is first used.
"""

from typing import TYPE_CHECKING

from .lazy import lazy_names
from .registration import register_when_used
from .version import __version__

if TYPE_CHECKING:
    from .modeling_vlv import FLORENCE_TASK_PROMPT_IDS, VLVConfig, VLVModel, VLVModelOutput
    from .modeling_vlv_captioner import VLVForConditionalGeneration
    from .processing_vlv import VLVImageProcessor
    from .processing_vlv_captioner import VLVProcessor

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

_MODULES = {
    "FLORENCE_TASK_PROMPT_IDS": "modeling_vlv",
    "VLVConfig": "modeling_vlv",
    "VLVForConditionalGeneration": "modeling_vlv_captioner",
    "VLVImageProcessor": "processing_vlv",
    "VLVModel": "modeling_vlv",
    "VLVModelOutput": "modeling_vlv",
    "VLVProcessor": "processing_vlv_captioner",
}

__getattr__, __dir__ = lazy_names(__name__, _MODULES)

register_when_used()
