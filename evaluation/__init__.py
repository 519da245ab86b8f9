"""Metrics of pictures."""

from .metrics import EncoderFeatures, SetMeter, SetMetrics, inception_is_at_hand, picture_metrics

__all__ = ["EncoderFeatures", "SetMeter", "SetMetrics", "inception_is_at_hand", "picture_metrics"]
