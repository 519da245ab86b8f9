"""One folder or Hub repository that holds encoder, captioner and diffusion model: write it, load it, push it."""

from vlv.tokenizer import load_tokenizer

from .card import Card
from .compatibility import COMPARED_FILES, check_compatible, check_text_encoders, text_encoders_fingerprint
from .convert import Conversion, convert
from .decoder import DiffusionModel, diffusion_model_of, find_diffusion_model, has_own_diffusion_model
from .describe import Description, describe
from .export import add_diffusion_model, export
from .fingerprint import fingerprint
from .language_model import export_language_model
from .layout import (
    CAPTIONER_FILES,
    CAPTIONER_FINGERPRINT,
    DIFFUSION_FILES,
    ENCODER_FILES,
    OPTIONAL_TEXT_ENCODER_FILES,
    PIPELINE_FILES,
    TEXT_ENCODER_FILES,
    TRAINING_FILE,
)
from .load import (
    caption_embeds_shape,
    has_two_encoders,
    load_captioner,
    load_diffusion_components,
    load_encoder,
    read_config,
    require,
    resolve,
)
from .push import UploadError, push, upload_errors, write_repository

__all__ = [
    "CAPTIONER_FILES",
    "CAPTIONER_FINGERPRINT",
    "COMPARED_FILES",
    "DIFFUSION_FILES",
    "ENCODER_FILES",
    "OPTIONAL_TEXT_ENCODER_FILES",
    "PIPELINE_FILES",
    "TEXT_ENCODER_FILES",
    "TRAINING_FILE",
    "Card",
    "Conversion",
    "Description",
    "DiffusionModel",
    "UploadError",
    "add_diffusion_model",
    "caption_embeds_shape",
    "check_compatible",
    "check_text_encoders",
    "convert",
    "describe",
    "diffusion_model_of",
    "export",
    "export_language_model",
    "find_diffusion_model",
    "fingerprint",
    "has_own_diffusion_model",
    "has_two_encoders",
    "load_captioner",
    "load_diffusion_components",
    "load_encoder",
    "load_tokenizer",
    "push",
    "read_config",
    "require",
    "resolve",
    "text_encoders_fingerprint",
    "upload_errors",
    "write_repository",
]
