"""The Hub layout: which file holds what, and which of them each user downloads.

It serves transformers and diffusers at once, and holds each weight once:

    config.json, generation_config.json, model.safetensors.index.json, language_model.safetensors    the captioner
    processor_config.json, tokenizer*.json, chat_template.jinja                                      its processor
    model_index.json, unet/, vae/, scheduler/, tokenizer/, image_processor/                          the reconstruction
    encoder/config.json, encoder/model.safetensors                                                   shared by both
    *.py, encoder/*.py, image_processor/*.py                                                         code for strangers
"""

from pathlib import PurePosixPath

ENCODER_PREFIX = "model."  # of the encoder's weights: the captioner's base_model_prefix
ENCODER_FILE = "encoder/model.safetensors"
LANGUAGE_MODEL_FILE = "language_model.safetensors"  # deliberately not model*.safetensors, which diffusers would fetch
INDEX_FILE = "model.safetensors.index.json"
HALF_INDEX_FILE = "model.safetensors.index.fp16.json"
TRAINING_FILE = "training.json"  # how the model came about
CARD = "README.md"
PIPELINE_PARTS = ("unet", "vae", "scheduler", "tokenizer")

CAPTIONER_FILES = ["*.json", "*.jinja", "*.txt", "encoder/*", "model*.safetensors", LANGUAGE_MODEL_FILE]
CAPTIONER_ONLY = (  # what a stage-1 model does not have
    LANGUAGE_MODEL_FILE,
    "generation_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "pipeline_vlv_captioning.py",
)
ENCODER_FILES = ["*.json", "encoder/*"]
DIFFUSION_FILES = ["model_index.json", *(f"{part}/*" for part in PIPELINE_PARTS)]
PIPELINE_FILES = [*DIFFUSION_FILES, "*_config.json", "encoder/*"]
PICKLES = ["*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt"]
OWNED = [  # what a push replaces, and takes away where it has no such file
    *("*.safetensors", "*.json", "*.jinja", "*.py", *PICKLES),
    *(f"{folder}/*" for folder in ("encoder", "image_processor", *PIPELINE_PARTS)),
]
TRAINER_FOLDERS = ("checkpoint-", "global_step")  # of transformers' trainer and of DeepSpeed
TRAINER_STATE = ("optimizer", "scheduler", "scaler", "rng_state", "training_args", "average")


def pickles(names: list[str]) -> list[str]:
    """Those of a folder's or repository's files that may hold pickled weights (a trainer's own state does not)."""
    return [
        name
        for name in names
        if any(PurePosixPath(name).match(pattern) for pattern in PICKLES)
        and not PurePosixPath(name).name.startswith(TRAINER_STATE)
        and not any(part.startswith(TRAINER_FOLDERS) for part in PurePosixPath(name).parts)
    ]


def half_name(name: str) -> str:
    """What a file of weights is called in half precision: `unet.safetensors` becomes `unet.fp16.safetensors`.

    Of a part of several, the number stays last: `unet.fp16-00001-of-00002.safetensors`.
    """
    stem = name.removesuffix(".safetensors")
    first, dash, number = stem.partition("-")
    return f"{first}.fp16{dash}{number}.safetensors"
