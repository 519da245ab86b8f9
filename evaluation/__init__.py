"""Metrics of pictures and captions."""

from .metrics import (
    EncoderFeatures,
    SetMetrics,
    as_bytes,
    inception_is_at_hand,
    picture_metrics,
    set_metrics,
)

__all__ = ["EncoderFeatures", "SetMetrics", "as_bytes", "inception_is_at_hand", "picture_metrics", "set_metrics"]
