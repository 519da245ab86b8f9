"""Captioning (a pipeline of transformers), reconstruction (a pipeline of diffusers), and scores of captions.

A name is imported when it is first used, so that captions do not wait for diffusers.
"""

from typing import TYPE_CHECKING

from vlv.lazy import lazy_names

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
    "CaptionScores": "diffusion_score",
    "ConfidenceMarker": "confidence",
    "DiffusionScorer": "diffusion_score",
    "ReconstructionPipeline": "loading",
    "VLVCaptioningPipeline": "pipeline_vlv_captioning",
    "VLVPooledReconstructionPipeline": "pipeline_vlv_pooled_reconstruction",
    "VLVReconstructionPipeline": "pipeline_vlv_reconstruction",
    "build_reconstruction": "loading",
    "generate_captions": "generation",
    "generate_images": "generation",
    "load_reconstruction": "loading",
    "mark_confidence": "confidence",
    "resized_pixels": "confidence",
    "to_pixels": "diffusion_score",
    "trim_caption": "pipeline_vlv_captioning",
}

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
