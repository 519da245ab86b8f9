"""Models out of a folder or Hub repository, part by part, without running any code of it."""

import os
from math import prod
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from ..diffusion_decoder.parts import load_part
from ..files import read_header, read_json, refuse_damaged
from ..modeling_vlv import VLVConfig, VLVForConditionalGeneration, VLVModel
from ..processing_vlv import VLVImageProcessor, VLVProcessor
from ..published import instead
from .layout import (
    CAPTIONER_FILES,
    DECODER_FILES,
    ENCODER_FILES,
    ENCODER_PREFIX,
    INDEX_FILE,
    LANGUAGE_MODEL_FILE,
    PICKLES,
    is_variant,
    pickles,
)

HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]  # of the HTTP library that huggingface_hub uses, whichever


def resolve(
    source: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | None = None,
    allow_patterns: list[str] | None = None,
    pickles_allowed: bool = False,
) -> Path:
    """The local folder of a model: itself, or a download of what is asked for of the repository `source`.

    Args:
        pickles_allowed: Whether there may be pickles beside it, as in most Stable Diffusion repositories. They are
            not downloaded, and nothing here reads one.

    Raises:
        FileNotFoundError: If `source` looks like a path and is no folder, or the repository cannot be had.
        ValueError: If there are pickles in it.
    """
    path = Path(source)
    if path.is_dir():
        if not pickles_allowed:
            _refuse_pickles(path.name, [p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()])
        return path
    text = os.fspath(source)
    if text.startswith((".", "/", "~")) or text.count("/") != 1 or path.exists():
        raise FileNotFoundError(f"{text} is neither a folder with a model nor a repo id like org/name")
    try:
        if not pickles_allowed and not constants.is_offline_mode():
            _refuse_pickles(text, _list_files(text, revision, token))
        return Path(
            snapshot_download(
                text,
                revision=revision,
                token=token,
                allow_patterns=allow_patterns,
                ignore_patterns=[*PICKLES, "*.fp16*"],
            )
        )
    except (RepositoryNotFoundError, RevisionNotFoundError, LocalEntryNotFoundError, OSError, HTTP_ERROR) as error:
        raise FileNotFoundError(
            f"there is no folder {text}, and as a Hub repository it cannot be had: {error}{instead(text)}"
        ) from error


def _list_files(repo: str, revision: str | None, token: str | None) -> list[str]:
    """The repository's files, or none where the network fails: what is in the cache may still be used."""
    try:
        return HfApi(token=token).list_repo_files(repo, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except HTTP_ERROR:
        return []


def _refuse_pickles(source: str, names: list[str]) -> None:
    if found := pickles(names):
        raise ValueError(
            f"{source} holds pickled weights ({', '.join(found[:3])}), which can run code when they are loaded; VLV "
            "reads safetensors alone. Take the pickles out, or convert the weights to safetensors first"
        )


def load_captioner(
    source: str | os.PathLike, *, revision: str | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[VLVForConditionalGeneration, VLVProcessor]:
    """The captioner and its processor, from a folder or repo id; no code of the repository is run.

    Raises:
        FileNotFoundError: If there is no such folder or no VLV in it.
        ValueError: If it is a stage-1 checkpoint, which has no language model.
    """
    folder = resolve(source, revision=revision, allow_patterns=CAPTIONER_FILES)
    require(folder, "config.json")
    model = _load_whole(VLVForConditionalGeneration, folder, dtype)
    processor = VLVProcessor(VLVImageProcessor.from_pretrained(folder), load_tokenizer(folder))
    return model.to(device).eval(), processor


def load_encoder(
    source: str | os.PathLike,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    for_captions: bool = False,
) -> tuple[VLVModel, VLVImageProcessor]:
    """The encoder and its image processor, from a Hub-layout folder or repo id, or from a stage-1 checkpoint.

    Args:
        for_captions: Where there are two encoders (`has_two_encoders`): the one whose embeddings the language model
            reads, instead of the one whose embeddings the decoder reads.
    """
    folder = resolve(source, revision=revision, allow_patterns=ENCODER_FILES)
    part = folder / "encoder" if (folder / "encoder" / "config.json").is_file() else folder
    if for_captions and has_two_encoders(folder):
        part = folder = resolve(source, revision=revision, allow_patterns=CAPTIONER_FILES)
    require(part, "config.json")
    model = _load_whole(VLVModel, part, dtype)
    return model.to(device).eval(), VLVImageProcessor.from_pretrained(folder)


def _load_whole(model_class: Any, folder: Path, dtype: torch.dtype) -> Any:
    """As `from_pretrained`, but weights that are missing or of another shape are an error, not a random start."""
    read_config(folder)
    if (folder / INDEX_FILE).is_file():
        for file in set(read_weight_map(folder).values()):
            require(folder, file)
            read_header(folder / file)
    try:
        model, report = model_class.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (
        SafetensorError,
        StrictDataclassError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RuntimeError,
    ) as error:
        refuse_damaged(folder)
        raise ValueError(f"{folder} cannot be loaded: {error!r}") from error
    unexpected = sorted(report["unexpected_keys"])
    if any(".lora_A." in name for name in unexpected):
        raise ValueError(
            f"{folder} is a checkpoint of a LoRA run that has not ended; go on with `vlv train stage2` and the same "
            "settings, which saves a whole model at the end"
        )
    lacking = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if lacking:
        raise ValueError(f"{len(lacking)} weights of {folder} are missing or of another shape, such as {lacking[0]}")
    if unexpected:
        raise ValueError(
            f"{len(unexpected)} weights of {folder} have no place in the model that its config.json describes, "
            f"such as {unexpected[0]}"
        )
    return model


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a VLV.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged, or another model's, or says nothing of a language model that lies beside it.
    """
    require(folder, "config.json")
    config = read_json(folder / "config.json")
    if config.get("model_type") != VLVConfig.model_type:
        raise ValueError(f"{folder / 'config.json'} is of a model of type {config.get('model_type')!r}, not a VLV")
    needed: tuple[str, ...] = ("encoder_config", "text_encoder_config")
    if (folder / LANGUAGE_MODEL_FILE).is_file():
        needed += ("decoder_config",)
    for name in ("encoder_config", "text_encoder_config", "decoder_config"):
        if not isinstance(config.get(name, {}), dict | None):
            raise ValueError(f"{folder / 'config.json'}: {name} is no JSON object")
    return read_json(folder / "config.json", *needed)


def read_weight_map(folder: Path) -> dict[str, str]:
    """Which file holds which weight. Raises `ValueError` that names the index if it is none."""
    weight_map = read_json(folder / INDEX_FILE, "weight_map")["weight_map"]
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{folder / INDEX_FILE}: weight_map is not an object of file names")
    return weight_map


def require(folder: Path, name: str) -> None:
    """Raises `FileNotFoundError` if a VLV's folder lacks a file."""
    if not (folder / name).is_file():
        raise FileNotFoundError(
            f"no {name} in {folder}: this is no VLV in the Hub's layout (vlv.hub.export writes it)"
        )


def has_two_encoders(folder: Path) -> bool:
    """Whether captions come from another encoder than reconstructions; what differs lies with the LM."""
    if not (folder / INDEX_FILE).is_file():
        return False
    weights = read_weight_map(folder).items()
    return any(name.startswith(ENCODER_PREFIX) and file == LANGUAGE_MODEL_FILE for name, file in weights)


def load_decoder_parts(
    source: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """`unet`, `vae`, `scheduler` and `tokenizer` of a Stable Diffusion or VLV folder or repo id.

    Args:
        dtype: Of UNet and autoencoder; by default what they are stored in.

    Raises:
        FileNotFoundError: If there is no such folder, or it has no decoder in it.
        ValueError: If its scheduler is not one of diffusers'.
    """
    folder = resolve(source, revision=revision, token=token, allow_patterns=DECODER_FILES, pickles_allowed=True)
    require(folder, "model_index.json")
    index = read_json(folder / "model_index.json", "scheduler", "unet", "vae")
    name = index["scheduler"][1]
    scheduler = getattr(diffusers, str(name), None)
    if not (isinstance(scheduler, type) and issubclass(scheduler, diffusers.SchedulerMixin)):
        raise ValueError(f"{folder / 'model_index.json'} names the scheduler {name!r}, which diffusers does not have")
    read_json(folder / "scheduler" / "scheduler_config.json", "beta_schedule")
    parts: dict[str, Any] = {"scheduler": getattr(diffusers, name).from_pretrained(folder, subfolder="scheduler")}
    for name, part in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        stored = dtype or stored_dtype(folder / name)
        parts[name] = load_part(part, folder, name, torch_dtype=stored)
    read_json(folder / "tokenizer" / "tokenizer_config.json")  # else its path might be taken for a repo id
    parts["tokenizer"] = load_tokenizer(folder / "tokenizer")
    if parts["tokenizer"].pad_token is None:
        raise ValueError(f"{folder / 'tokenizer'} names no padding token; is its tokenizer_config.json whole?")
    return parts


def load_tokenizer(source: str | os.PathLike, **kwargs: Any) -> Any:
    """A tokenizer as it was saved.

    transformers 5 takes every tokenizer beside a Qwen2 (and some others) for Qwen2's own, whatever its configuration
    says, and then reads another one's words as nonsense without a warning. A generic one is therefore loaded as such.
    """
    if Path(source).is_dir():
        for path in Path(source).glob("*token*.json"):
            read_json(path, *(["model"] if path.name == "tokenizer.json" else []))
    declared = get_tokenizer_config(os.fspath(source), **kwargs).get("tokenizer_class")
    generic = declared in ("TokenizersBackend", "PreTrainedTokenizerFast")
    try:
        if generic:
            return PreTrainedTokenizerFast.from_pretrained(source, **kwargs)
        # By default transformers would ask, and then run code out of the repository.
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **kwargs)
    except OSError:
        raise  # says what is missing
    except Exception as error:  # the tokenizers library raises nothing more exact
        raise ValueError(f"the tokenizer in {source} cannot be read; are its files whole? {error!r}") from error


def stored_dtype(folder: Path) -> torch.dtype:
    """What the first safetensors file of a folder is stored in, by its largest tensor; float32 if there is none."""
    for path in sorted(p for p in folder.glob("*.safetensors") if not is_variant(p.name)):
        _, dtype = max(read_header(path).values(), key=lambda weight: prod(weight[0]), default=((), "float32"))
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(
                f"{path} is stored in {dtype}, which cannot be read here; convert it to float16 or float32"
            )
        return getattr(torch, dtype)
    return torch.float32
