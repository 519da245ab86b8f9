"""The Hub layout: which file holds what, and which files each user downloads.

It serves transformers and diffusers, and stores each weight once:

    config.json, generation_config.json, model.safetensors.index.json, captioner.safetensors         captioner
    encoder_captioner.safetensors                                      its own encoder, where it differs
    processor_config.json, tokenizer*.json, chat_template.jinja                                      its processor
    model_index.json, unet/, vae/, scheduler/, tokenizer/, image_processor/                          reconstruction
    (or the components of another family of text-to-image models)
    encoder/config.json, encoder/model.safetensors                                                   shared by both
    *.py, encoder/*.py, image_processor/*.py                                                         code of vlv
    modular_config.json, modular_model_index.json, encoder/preprocessor_config.json                  Modular Diffusers
"""

from pathlib import PurePosixPath
from typing import Any

from vlv.diffusion_decoder import FAMILIES, DiffusionDecoder

ENCODER_PREFIX = "model."  # of the encoder's weight names: the captioner's base_model_prefix
ENCODER_FILE = "encoder/model.safetensors"
# Two files, because transformers reads them in alphabetical order: it looks for weights that it leaves on disk in the
# folder of the first, and of a weight in two files the last counts. Not model*.safetensors, which diffusers downloads.
CAPTIONER_FILE = "captioner.safetensors"  # before encoder/
CAPTIONER_ENCODER_FILE = (
    "encoder_captioner.safetensors"  # after encoder/: weights of the captioner's encoder that differ
)
OLDER_CAPTIONER_FILE = "language_model.safetensors"  # both, in repositories of version 0.2.0
CAPTIONER_WEIGHTS = (CAPTIONER_FILE, CAPTIONER_ENCODER_FILE, OLDER_CAPTIONER_FILE)
INDEX_FILE = "model.safetensors.index.json"
HALF_INDEX_FILE = "model.safetensors.index.fp16.json"
TRAINING_FILE = "training.json"  # training metadata of each stage
CARD_FILE = "README.md"
WEIGHTS_FILE = "model.safetensors"  # of one component, or of a checkpoint that is no model by itself
ONLY_TRAINED = {"tensors": "trained"}  # in the metadata of the latter, where it lacks all that is frozen
ADAPTER_FOLDER = "adapter"  # of a LoRA training, in peft's format
MODEL_INDEX_FILE = "model_index.json"  # of the reconstruction pipeline
PIPELINE_PARTS = tuple(dict.fromkeys(name for family in FAMILIES for name in family.component_names()))

CAPTIONER_FILES = ["*.json", "*.jinja", "*.txt", "encoder/*", "model*.safetensors", *CAPTIONER_WEIGHTS]
CAPTIONER_FINGERPRINT = [  # files that change captions
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", INDEX_FILE),
    *("model*.safetensors", "encoder/*.safetensors", *CAPTIONER_WEIGHTS),
]
CAPTIONER_ONLY = (  # files that a stage-1 model does not have
    *CAPTIONER_WEIGHTS,
    "generation_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "modeling_vlv_captioner.py",
    "generation_vlv.py",
    "processing_vlv_captioner.py",
    "pipeline_vlv_captioning.py",
)
ENCODER_FOLDER = "encoder"
ENCODER_FILES = ["*.json", f"{ENCODER_FOLDER}/*"]
DIFFUSION_FILES = ["model_index.json", *(f"{part}/*" for part in PIPELINE_PARTS)]
TEXT_ENCODER_FILES = [  # of a text-to-image model; those that its family works without are downloaded on request
    f"{name}/*" for name in dict.fromkeys(name for family in FAMILIES for name in family.text_encoders)
]
OPTIONAL_TEXT_ENCODER_FILES = [
    f"{name}/*" for name in dict.fromkeys(name for family in FAMILIES for name in family.optional_text_encoders)
]
PIPELINE_FILES = [*DIFFUSION_FILES, "*_config.json", "encoder/*"]
PICKLES = ["*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt"]
OWNED = [  # files that a push replaces, or deletes where it has no such file
    *("*.safetensors", "*.json", "*.jinja", "*.py", *PICKLES),
    *(f"{folder}/*" for folder in ("encoder", "image_processor", *PIPELINE_PARTS)),
]
TRAINER_FOLDERS = ("checkpoint-", "global_step")  # of transformers' trainer and of DeepSpeed
TRAINER_STATE = ("optimizer", "scheduler", "scaler", "rng_state", "training_args", "average")


def reconstruction_classes(family: type[DiffusionDecoder]) -> dict[str, Any]:
    """The entries of `model_index.json` that name classes of the code in the repository."""
    return {
        "_class_name": list(family.reconstruction_pipeline),
        "encoder": ["modeling_vlv", "VLVModel"],
        "image_processor": ["processing_vlv", "VLVImageProcessor"],
    }


def pickles(names: list[str]) -> list[str]:
    """The names of files that may hold pickled weights. A trainer's own state is not among them."""
    return [
        name
        for name in names
        if any(PurePosixPath(name).match(pattern) for pattern in PICKLES)
        and not PurePosixPath(name).name.startswith(TRAINER_STATE)
        and not any(part.startswith(TRAINER_FOLDERS) for part in PurePosixPath(name).parts)
    ]


def half_name(name: str) -> str:
    """The name of a weight file in half precision: `unet.safetensors` becomes `unet.fp16.safetensors`.

    The number of a shard stays last: `unet.fp16-00001-of-00002.safetensors`.
    """
    stem = name.removesuffix(".safetensors")
    first, dash, number = stem.partition("-")
    return f"{first}.fp16{dash}{number}.safetensors"
