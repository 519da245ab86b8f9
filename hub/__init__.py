"""One folder, or Hub repository, out of encoder, captioner and decoder; loading it back; pushing it."""

from vlv.tokenizer import load_tokenizer

from .convert import Conversion, convert
from .describe import Description, describe
from .export import export
from .layout import CAPTIONER_FILES, ENCODER_FILES, PIPELINE_FILES, TRAINING_FILE
from .load import (
    has_two_encoders,
    load_captioner,
    load_diffusion_components,
    load_encoder,
    read_config,
    require,
    resolve,
)
from .push import create, push, upload, write_repository

__all__ = [
    "CAPTIONER_FILES",
    "ENCODER_FILES",
    "PIPELINE_FILES",
    "TRAINING_FILE",
    "Conversion",
    "Description",
    "convert",
    "create",
    "describe",
    "export",
    "has_two_encoders",
    "load_captioner",
    "load_diffusion_components",
    "load_encoder",
    "load_tokenizer",
    "push",
    "read_config",
    "require",
    "resolve",
    "upload",
    "write_repository",
]
