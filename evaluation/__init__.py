"""Metrics of images and of sets of images, and the tables that show them."""

from .markdown import markdown_table
from .metrics import EncoderFeatures, SetMeter, SetMetrics, image_metrics, inception_is_available

__all__ = [
    "EncoderFeatures",
    "SetMeter",
    "SetMetrics",
    "image_metrics",
    "inception_is_available",
    "markdown_table",
]
