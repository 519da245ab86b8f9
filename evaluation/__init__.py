"""Metrics of images, of sets of images and of captions, and the tables that show them."""

from .features import EncoderFeatures, inception_is_available
from .image_similarity import SetMeter, SetMetrics, image_metrics
from .markdown import markdown_table

__all__ = [
    "EncoderFeatures",
    "SetMeter",
    "SetMetrics",
    "image_metrics",
    "inception_is_available",
    "markdown_table",
]
