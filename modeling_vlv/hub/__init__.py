"""One folder, or Hub repository, out of encoder, captioner and decoder; loading it back; pushing it."""

from .describe import Description, describe
from .export import export
from .layout import CAPTIONER_FILES, ENCODER_FILES, PIPELINE_FILES, TRAINING_FILE
from .load import (
    has_two_encoders,
    load_captioner,
    load_decoder_parts,
    load_encoder,
    load_tokenizer,
    read_config,
    require,
    resolve,
)
from .push import create, push, stage, upload

__all__ = [
    "CAPTIONER_FILES",
    "ENCODER_FILES",
    "PIPELINE_FILES",
    "TRAINING_FILE",
    "Description",
    "create",
    "describe",
    "export",
    "has_two_encoders",
    "load_captioner",
    "load_decoder_parts",
    "load_encoder",
    "load_tokenizer",
    "push",
    "read_config",
    "require",
    "resolve",
    "stage",
    "upload",
]
