"""Captioning (a pipeline of transformers), reconstruction (a pipeline of diffusers), and scores of captions.

A name is imported when it is first used, so that captions do not wait for diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .confidence import ConfidenceMarker, mark_confidence, resized_pixels
    from .diffusion_score import CaptionScores, DiffusionScorer, to_pixels
    from .generation import generate_captions, generate_images
    from .loading import ReconstructionPipeline, build_reconstruction, load_reconstruction
    from .pipeline_vlv_captioning import VLVCaptioningPipeline, trim_caption
    from .pipeline_vlv_pooled_reconstruction import VLVPooledReconstructionPipeline
    from .pipeline_vlv_reconstruction import VLVReconstructionPipeline

__all__ = [
    "CaptionScores",
    "ConfidenceMarker",
    "DiffusionScorer",
    "ReconstructionPipeline",
    "VLVCaptioningPipeline",
    "VLVPooledReconstructionPipeline",
    "VLVReconstructionPipeline",
    "build_reconstruction",
    "generate_captions",
    "generate_images",
    "load_reconstruction",
    "mark_confidence",
    "resized_pixels",
    "to_pixels",
    "trim_caption",
]

_MODULES = {
    "generate_captions": "generation",
    "generate_images": "generation",
    "VLVCaptioningPipeline": "pipeline_vlv_captioning",
    "trim_caption": "pipeline_vlv_captioning",
    "ConfidenceMarker": "confidence",
    "mark_confidence": "confidence",
    "resized_pixels": "confidence",
    "CaptionScores": "diffusion_score",
    "DiffusionScorer": "diffusion_score",
    "to_pixels": "diffusion_score",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES.get(name, 'loading')}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
