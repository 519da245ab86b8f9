"""VLV: image captions, and images reconstructed from caption embeddings (Vision-Language-Vision, arXiv 2507.07104).

`import vlv` loads neither torch nor transformers: a class is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
    "VLVForConditionalGeneration": "modeling_vlv_captioner",
    "VLVImageProcessor": "processing_vlv",
    "VLVProcessor": "processing_vlv_captioner",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES.get(name, 'modeling_vlv')}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_when_used()
