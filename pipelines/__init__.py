"""Captioning (a pipeline of transformers), reconstruction (a pipeline of diffusers), and scores of captions."""

from . import components  # noqa: F401 (from_pretrained loads them)
from .confidence import MIN_SCORE, ConfidenceMarker, mark_confidence, resized_pixels
from .diffusion_score import CaptionScores, DiffusionScorer, to_pixels
from .generation import generate_captions, generate_images
from .loading import ReconstructionPipeline, build_reconstruction, load_reconstruction
from .pipeline_vlv_captioning import VLVCaptioningPipeline, trim_caption
from .pipeline_vlv_pooled_reconstruction import VLVPooledReconstructionPipeline
from .pipeline_vlv_reconstruction import VLVReconstructionPipeline

__all__ = [
    "MIN_SCORE",
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
