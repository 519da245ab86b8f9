"""Pipelines: captions by transformers, reconstructions by diffusers."""

from .loading import load_reconstruction
from .pipeline_vlv_captioning import VLVCaptioningPipeline, trim_caption
from .pipeline_vlv_reconstruction import VLVReconstructionPipeline

__all__ = ["VLVCaptioningPipeline", "VLVReconstructionPipeline", "load_reconstruction", "trim_caption"]
