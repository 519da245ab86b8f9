"""Describes a checkpoint by its configurations and the headers of its files. No weight is read or downloaded."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError, SafetensorsParsingError

from vlv.diffusion_decoder import find_family
from vlv.files import DTYPES, Header, is_variant, read_header, read_json
from vlv.original_checkpoint import find_checkpoint, read_weights

from .card import DIFFUSION_LABELS, LICENCES, pretrained_models, read_training
from .decoder import referred_diffusion_model
from .layout import ADAPTER_FOLDER, CAPTIONER_WEIGHTS, CARD_FILE, INDEX_FILE, MODEL_INDEX_FILE, TRAINER_FOLDERS
from .load import (
    caption_embeds_shape,
    file_sizes,
    read_config,
    read_weight_map,
    refuse_partial_checkpoint,
    resolve,
    to_repo_id,
)

METADATA_FILES = ["*.json", "*/*.json", CARD_FILE]
ORIGINAL = ("pytorch_model.bin", "model.pt", "checkpoint_*.pt")
ORIGINAL_PARTS = (  # prefixes of weight names in the authors' checkpoints
    ("unet.", "denoiser"),
    ("vae.", "autoencoder"),
    ("text_encoder.", "text encoder"),
    ("language_proj.", "query tokens and projector"),
    ("query_embed", "query tokens and projector"),
    ("model.", "image encoder"),
    ("mlp.", "language projection"),
    ("qwen2_model.", "language model"),
)
PARTS = (  # prefixes of weight names here
    ("language_model.", "language model"),
    ("language_projection.", "language projection"),
    ("query_tokens", "query tokens and projector"),
    ("projector.", "query tokens and projector"),
    ("text_encoder.", "text encoder"),
    ("text_encoder_2.", "text encoder 2"),
    ("text_encoder_3.", "text encoder 3"),
    ("image_encoder.", "image encoder"),
    ("multi_modal_projector.", "query decoder"),
    ("query_decoder.", "query decoder"),
)

WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "float64": 8, "int32": 4, "uint8": 1}  # bytes


@dataclass
class Part:
    """One component: its number of parameters, their bytes, and the parameters of each precision."""

    name: str
    parameters: int = 0
    bytes: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)

    def add(self, shape: tuple[int, ...], dtype: str) -> None:
        count = prod(shape)
        self.parameters += count
        self.bytes += count * WIDTHS.get(dtype, 4)
        self.dtypes[dtype] = self.dtypes.get(dtype, 0) + count


@dataclass
class Description:
    """What `vlv info` prints.

    Attributes:
        kind: Such as "stage 2: captions" or "the authors' stage 1: reconstructions".
        family: Of the text-to-image model in it, if there is one.
        parts: Its components.
        licences: Of the model and of its pretrained parts, as far as the checkpoint says.
        files: Name and bytes of each file.
        properties: Numbers of the configuration, missing files, training checkpoints.
    """

    source: str
    kind: str
    family: str | None = None
    parts: list[Part] = field(default_factory=list)
    licences: dict[str, str] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    properties: dict[str, Any] = field(default_factory=dict)


def describe(source: str | os.PathLike, *, revision: str | None = None, token: str | None = None) -> Description:
    """Describes a folder, a Hub repository, or a checkpoint of the authors' code.

    Raises:
        FileNotFoundError: If there is no such file, folder or repository.
        ValueError: If it is not a VLV model, or a file is damaged.
    """
    path = Path(source)
    if path.is_file() or (path.is_dir() and not (path / "config.json").is_file()):
        refuse_partial_checkpoint(path)
        return _describe_original(path)
    if path.is_dir():
        return _describe_folder(os.fspath(source), path)
    repo, api = to_repo_id(source), HfApi(token=token)
    try:
        if constants.is_offline_mode():
            raise ConnectionError("HF_HUB_OFFLINE is set")
        files = file_sizes(repo, revision, token)
        folder = resolve(source, revision=revision, token=token, allow_patterns=METADATA_FILES)
        return _describe_vlv(repo, folder, files, lambda name: _remote_header(api, repo, name, revision))
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"there is no folder or repository {source}: {error}") from error
    except (HTTPError, ConnectionError) as error:
        folder = resolve(source, revision=revision, token=token, allow_patterns=METADATA_FILES, local_files_only=True)
        found = _describe_folder(repo, folder)
        reason = str(error).partition("\n")[0] or type(error).__name__
        found.properties["only what is in the cache"] = f"the Hub does not answer ({reason})"
        return found


def _describe_folder(source: str, folder: Path) -> Description:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    return _describe_vlv(source, folder, sizes, lambda name: read_header(folder / name))


def _describe_vlv(source: str, folder: Path, sizes: dict[str, int], header_of: Callable[[str], Header]) -> Description:
    """Describes a model by its configurations in `folder` and the headers of its weights, which may be remote."""
    config = read_config(folder)
    training = {name: size for name, size in sizes.items() if name.startswith(TRAINER_FOLDERS)}
    files = {name: size for name, size in sizes.items() if name not in training and not name.startswith(".")}
    captions = config.get("text_config") is not None
    index = folder / MODEL_INDEX_FILE
    found = Description(
        source,
        "stage 2: captions" + (" and reconstructions" if index.is_file() else "")
        if captions
        else "stage 1: " + ("reconstructions" if index.is_file() else "caption embeddings") + ", no captions",
        family=_family(folder) if index.is_file() else None,
        files=files,
    )
    num_query_tokens, width = caption_embeds_shape(config)
    found.properties = {
        "caption embeddings": f"{num_query_tokens} x {width}",
        "language model": (config.get("text_config") or {}).get("model_type"),
        "instructions": ", ".join(config.get("instructions") or []) or None,
    }
    parts: dict[str, Part] = {}
    for file in files:
        if not file.endswith(".safetensors") or is_variant(file):
            continue
        for name, (shape, dtype) in header_of(file).items():
            label = _part(file, name, captions)
            parts.setdefault(label, Part(label)).add(shape, dtype)
    found.parts = list(parts.values())
    training_record = read_training(folder)
    if captions:
        found.properties["source of the language model"] = _language_model_source(training_record)
        stored = parts.get("language model", Part("")).dtypes
        found.properties["precision of the language model"] = (
            ", ".join(sorted(stored, key=lambda n: -stored[n])) or None
        )
    if (folder / INDEX_FILE).is_file():
        named = set(read_weight_map(folder).values())
        if missing := sorted(named - files.keys()):
            found.properties["missing"] = ", ".join(missing)
    if training:
        folders = sorted({name.partition("/")[0] for name in training})
        found.properties["training checkpoints"] = f"{', '.join(folders)} ({sum(training.values()):,} bytes)"
    if licence := _licence(folder / CARD_FILE):
        found.licences["this model"] = licence
    models = pretrained_models(training_record)
    found.licences |= {model: LICENCES[model] for model in models if model in LICENCES}
    return found


def _language_model_source(training: dict[str, dict[str, Any]]) -> str | None:
    """What the record of the last stage that names a language model says of it. None if there is no record."""
    record = next((stage for stage in reversed(training.values()) if stage.get("language_model")), None)
    if record is None:
        return None
    file = f", file {record['gguf_file']}" if record.get("gguf_file") else ""
    lora = f", trained by LoRA of rank {record['lora_rank']}" if record.get("lora_rank") else ""
    return f"{record['language_model']}{file}{lora}{' on weights in 4 bits' if record.get('load_in_4bit') else ''}"


def _licence(card: Path) -> str | None:
    """The licence in the front matter of a model card. None if there is none."""
    if not card.is_file():
        return None
    try:
        return ModelCard.load(card, ignore_metadata_errors=True).data.to_dict().get("license")
    except (ValueError, yaml.YAMLError):
        return "unknown: the front matter of README.md is not YAML"


def _part(file: str, name: str, captions: bool) -> str:
    folder = file.rpartition("/")[0]
    if folder in DIFFUSION_LABELS:
        return DIFFUSION_LABELS[folder]
    if folder == ADAPTER_FOLDER:
        return "LoRA adapter, merged into the language model"
    if "/" in file and folder != "encoder":
        return f"other: {folder}"
    if not folder and file not in CAPTIONER_WEIGHTS and not file.startswith("model"):
        return f"other: {file}"
    inner = name.removeprefix("model.")
    label = next((label for start, label in PARTS if inner.startswith(start)), "other")
    if captions and file in CAPTIONER_WEIGHTS and inner != name:
        return f"{label}, the captioner's own"
    return label


def _family(folder: Path) -> str:
    if (referred := referred_diffusion_model(folder)) is not None:
        revision = f", revision {referred.revision}" if referred.revision else ""
        return f"in another place: {referred.source}{revision} (`vlv push` copies it in)"
    index = read_json(folder / MODEL_INDEX_FILE, "scheduler")
    family = find_family(index, folder)
    config = folder / "scheduler" / "scheduler_config.json"
    predicts = family.describe_prediction(read_json(config) if config.is_file() else {})
    denoiser = index[family.denoiser_name()][1]
    return f"{family.title} ({denoiser}, {index['scheduler'][1]}, predicts {predicts})"


def _remote_header(api: HfApi, repo: str, name: str, revision: str | None) -> Header:
    try:
        header = api.parse_safetensors_file_metadata(repo, name, revision=revision)
    except SafetensorsParsingError as error:
        raise ValueError(f"{name} of {repo} is damaged, or not a safetensors file: {error}") from error
    return {key: (tuple(t.shape), DTYPES.get(t.dtype, t.dtype)) for key, t in header.tensors.items()}


def _describe_original(path: Path) -> Description:
    file = find_checkpoint(path, ORIGINAL)
    weights = read_weights(file, ORIGINAL)
    captions = any(name.startswith("qwen2_model.") for name in weights)
    queries = next((tensor for name, tensor in weights.items() if name.endswith("query_embed")), None)
    if queries is None or queries.ndim != 3:
        raise ValueError(
            f"{file} is neither a VLV model nor a checkpoint of the authors' code: it has no query_embed of "
            f"shape (1, query tokens, width); its weights begin with {', '.join(list(weights)[:3])}"
        )
    found = Description(str(path), "the authors' " + ("stage 2: captions" if captions else "stage 1: reconstructions"))
    parts: dict[str, Part] = {}
    seen: set[tuple] = set()
    for name, tensor in weights.items():
        place = (tensor.data_ptr(), tensor.shape)
        if place in seen:  # a second name of the same weight
            continue
        seen.add(place)
        inner = name.removeprefix("VLV_model.")
        label = next((label for start, label in ORIGINAL_PARTS if inner.startswith(start)), "other")
        parts.setdefault(label, Part(label)).add(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    found.parts, found.properties = list(parts.values()), {"query tokens": f"{queries.shape[1]} x {queries.shape[2]}"}
    found.files = {file.name: file.stat().st_size}
    found.family = "Stable Diffusion, in the same file" if "denoiser" in parts else None
    return found
