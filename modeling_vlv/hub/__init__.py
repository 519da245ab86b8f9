"""One folder, or Hub repository, out of encoder, captioner and decoder; loading it back; pushing it."""

from .export import export
from .layout import CAPTIONER_FILES, ENCODER_FILES, PIPELINE_FILES
from .load import load_captioner, load_encoder, require, resolve

__all__ = [
    "CAPTIONER_FILES",
    "ENCODER_FILES",
    "PIPELINE_FILES",
    "export",
    "load_captioner",
    "load_encoder",
    "require",
    "resolve",
]
