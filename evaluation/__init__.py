"""Metrics of pictures."""

from .metrics import EncoderFeatures, SetMeter, SetMetrics, image_metrics, inception_is_at_hand

__all__ = ["EncoderFeatures", "SetMeter", "SetMetrics", "image_metrics", "inception_is_at_hand"]
