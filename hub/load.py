"""Loads the parts of a model from a folder or Hub repository without running any code of it."""

import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # the base class of the HTTP library that huggingface_hub uses, httpx or httpx2
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError, safe_open

from vlv.diffusion_decoder import find_family
from vlv.diffusion_decoder.components import load_components
from vlv.files import read_header, read_json, refuse_damaged
from vlv.modeling_vlv import TEXT_ENCODERS, VLVConfig, VLVModel, refuse_renamed_fields
from vlv.modeling_vlv_captioner import VLVForConditionalGeneration
from vlv.processing_vlv import VLVImageProcessor
from vlv.processing_vlv_captioner import VLVProcessor
from vlv.reference_configs import replacement_hint
from vlv.tokenizer import check_tokenizer, fit_tokenizer, load_tokenizer

from .decoder import referred_diffusion_model
from .layout import (
    ADAPTER_FOLDER,
    CAPTIONER_FILES,
    CAPTIONER_WEIGHTS,
    DIFFUSION_FILES,
    ENCODER_FILES,
    ENCODER_PREFIX,
    INDEX_FILE,
    MODEL_INDEX_FILE,
    ONLY_TRAINED,
    PICKLES,
    WEIGHTS_FILE,
    pickles,
)


def resolve(
    source: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | None = None,
    allow_patterns: list[str] | None = None,
    pickles_allowed: bool = False,
    local_files_only: bool = False,
) -> Path:
    """The local folder of a model: `source` itself, or a download of the repository `source`.

    Where the Hub does not answer, the files in the cache are used.

    Args:
        allow_patterns: The files to download; by default all. Half-precision variants are never downloaded.
        pickles_allowed: Whether the model may hold pickles, as most Stable Diffusion repositories do. They are not
            downloaded, and nothing here reads one.
        local_files_only: Uses the cache without asking the Hub.

    Raises:
        FileNotFoundError: If `source` looks like a path and is not a folder, or the repository could not be loaded.
        ValueError: If it holds pickled weights.
    """
    path = Path(source)
    if path.is_dir():
        if not pickles_allowed:
            _refuse_pickles(path.name, [p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()])
        return path
    text = to_repo_id(source)
    try:
        if not (pickles_allowed or local_files_only or constants.is_offline_mode()):
            names = _list_files(text, revision, token)
            local_files_only = names is None
            _refuse_pickles(text, names or [])
        return Path(
            snapshot_download(
                text,
                revision=revision,
                token=token,
                allow_patterns=allow_patterns,
                ignore_patterns=[*PICKLES, "*.fp16*", "*.msgpack", "*.onnx*", "openvino_*"],
                local_files_only=local_files_only,
            )
        )
    except (RepositoryNotFoundError, RevisionNotFoundError, LocalEntryNotFoundError, OSError, HTTPError) as error:
        raise FileNotFoundError(
            f"there is no folder {text}, and as a Hub repository it could not be loaded: {error}"
            f"{replacement_hint(text)}{_access_hint(text, error)}"
        ) from error


def _access_hint(repo: str, error: BaseException) -> str:
    """The end of an error message of a gated repository."""
    if not isinstance(error, GatedRepoError):
        return ""
    return (
        f"\n{repo} is gated: accept its licence on {constants.ENDPOINT}/{repo}, and log in with `hf auth login`, or "
        "set HF_TOKEN"
    )


def to_repo_id(source: str | os.PathLike) -> str:
    """`source` as a repo id. Raises `FileNotFoundError` if it looks like a path."""
    text = os.fspath(source)
    if text.startswith((".", "/", "~")) or text.count("/") != 1 or Path(text).exists():
        raise FileNotFoundError(f"{text} is neither a folder with a model nor a repo id like org/name")
    return text


def _list_files(repo: str, revision: str | None, token: str | None) -> list[str] | None:
    """The repository's files; None if the Hub does not answer."""
    try:
        return list(file_sizes(repo, revision, token))
    except HTTPError as error:
        if isinstance(error, HfHubHTTPError) and 400 <= error.response.status_code < 429:
            raise  # an answer, such as that there is no such repository
        return None


def file_sizes(repo: str, revision: str | None, token: str | None) -> dict[str, int]:
    """Name and bytes of each file of a repository, by one request.

    `HfApi.list_repo_tree` tries again for 23 seconds where the Hub does not answer.

    Raises:
        HTTPError: If the Hub does not answer, or there is no such repository.
    """
    timeout = constants.HF_HUB_ETAG_TIMEOUT
    info = HfApi(token=token).model_info(repo, revision=revision, files_metadata=True, timeout=timeout)
    return {file.rfilename: file.size or 0 for file in info.siblings or []}


def _refuse_pickles(source: str, names: list[str]) -> None:
    if found := pickles(names):
        raise ValueError(
            f"{source} holds pickled weights ({', '.join(found[:3])}), which can run code when they are loaded; VLV "
            "reads safetensors alone. Remove the pickles, or convert the weights to safetensors first"
        )


def load_captioner(
    source: str | os.PathLike, *, revision: str | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[VLVForConditionalGeneration, VLVProcessor]:
    """The captioner, in evaluation mode, and its processor. No code of the repository runs.

    Args:
        source: A folder in the Hub layout, a stage-2 checkpoint, or a repo id.

    Raises:
        FileNotFoundError: If there is no such folder, or it holds no VLV model.
        ValueError: If it is a stage-1 model, which has no language model; if a file is damaged; if a weight is
            missing, unexpected, or of another shape; or if model and tokenizer name different image tokens.
    """
    folder = resolve(source, revision=revision, allow_patterns=CAPTIONER_FILES)
    if read_config(folder).get("text_config") is None:
        raise ValueError(
            f"{source} is a stage-1 model, which writes no captions; train stage 2 from it (vlv train stage2 --model "
            f"{source} --pairs ...)"
        )
    model = _load_strictly(VLVForConditionalGeneration, folder, dtype)
    tokenizer = fit_tokenizer(load_tokenizer(folder), model)
    check_tokenizer(tokenizer, model, str(folder))
    image_seq_length = model.config.num_query_tokens
    processor = VLVProcessor(VLVImageProcessor.from_pretrained(folder), tokenizer, image_seq_length=image_seq_length)
    if model.config.image_token_id is None:  # of version 0.2
        model.config.image_token_id = processor.image_token_id
    elif model.config.image_token_id != processor.image_token_id:
        raise ValueError(
            f"{folder}: config.json has image_token_id {model.config.image_token_id}, but the image token of the "
            f"tokenizer, {processor.image_token}, has the id {processor.image_token_id}; make them equal"
        )
    return model.to(device).eval(), processor


def load_encoder(
    source: str | os.PathLike,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    for_captions: bool = False,
) -> tuple[VLVModel, VLVImageProcessor]:
    """The encoder, in evaluation mode, and its image processor. No code of the repository runs.

    Args:
        source: A folder in the Hub layout, a stage-1 checkpoint, or a repo id.
        for_captions: Loads the captioner's encoder, if the model has two (`has_two_encoders`). By default the encoder
            for reconstruction is loaded.

    Raises:
        FileNotFoundError: If there is no such folder, or it holds no VLV model.
        ValueError: If a file is damaged, or a weight is missing, unexpected, or of another shape.
    """
    folder = resolve(source, revision=revision, allow_patterns=ENCODER_FILES)
    part = folder / "encoder" if (folder / "encoder" / "config.json").is_file() else folder
    if for_captions and has_two_encoders(folder):
        part = folder = resolve(source, revision=revision, allow_patterns=CAPTIONER_FILES)
    require(part, "config.json")
    model = _load_strictly(VLVModel, part, dtype)
    own = folder / "image_processor"  # of reconstruction; a saved pipeline has no other
    if not own.is_dir() or (for_captions and (folder / "preprocessor_config.json").is_file()):
        own = folder
    return model.to(device).eval(), VLVImageProcessor.from_pretrained(own)


def _load_strictly(model_class: Any, folder: Path, dtype: torch.dtype) -> Any:
    """`from_pretrained`, but a missing, misshaped or unexpected weight is an error, never a random start."""
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
        raise ValueError(f"{folder} could not be loaded: {error!r}") from error
    unexpected = sorted(report["unexpected_keys"])
    if model_class is VLVModel:  # a captioner's folder also holds a language model
        unexpected = [name for name in unexpected if not name.startswith(("language_model.", "language_projection."))]
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if missing:
        raise ValueError(f"{len(missing)} weights of {folder} are missing or of another shape, such as {missing[0]}")
    if unexpected:
        raise ValueError(
            f"{len(unexpected)} weights of {folder} have no place in the model that its config.json describes, "
            f"such as {unexpected[0]}"
        )
    return model


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a VLV model.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged, belongs to another model, has field names of version 0.1, or lacks the
            configuration of a language model whose weights are there.
    """
    require(folder, "config.json")
    config = read_json(folder / "config.json")
    if config.get("model_type") != VLVConfig.model_type:
        raise ValueError(
            f"{folder / 'config.json'} has the model type {config.get('model_type')!r}; expected a VLV model, "
            f"{VLVConfig.model_type!r}"
        )
    refuse_renamed_fields(config, str(folder / "config.json"))
    needed: tuple[str, ...] = ("image_encoder_config", "text_encoder_config")
    if any((folder / name).is_file() for name in CAPTIONER_WEIGHTS):
        needed += ("text_config",)
    for name in ("image_encoder_config", "text_encoder_config", "text_config"):
        if not isinstance(config.get(name, {}), dict | None):
            raise ValueError(f"{folder / 'config.json'}: {name} is not a JSON object")
    return read_json(folder / "config.json", *needed)


def caption_embeds_shape(config: dict[str, Any]) -> tuple[int, int]:
    """Number and width of the caption embeddings of a model, from its `config.json`; 0 for what it does not say."""
    encoders = [config.get(f"{name}_config") or {} for name in TEXT_ENCODERS]
    widths = [encoder.get("hidden_size", encoder.get("d_model", 0)) for encoder in encoders]  # T5 has d_model
    return config.get("num_query_tokens", 0), sum(widths)


def read_weight_map(folder: Path) -> dict[str, str]:
    """The file of each weight, by name. Raises `ValueError` if the index is damaged; the message names it."""
    weight_map = read_json(folder / INDEX_FILE, "weight_map")["weight_map"]
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{folder / INDEX_FILE}: weight_map is not an object of file names")
    return weight_map


def require(folder: Path, name: str) -> None:
    """Raises `FileNotFoundError` if the folder of a model has no file `name`."""
    if not (folder / name).is_file():
        if name == "config.json":
            refuse_partial_checkpoint(folder)
        raise FileNotFoundError(
            f"there is no {name} in {folder}: it is not a VLV model in the Hub layout (vlv.hub.export writes one)"
        )


def refuse_partial_checkpoint(folder: Path) -> None:
    """Raises `FileNotFoundError` if a folder without `config.json` is a checkpoint that is no complete model."""
    if holds_only_trained(folder):
        raise FileNotFoundError(
            f"{folder} is a checkpoint of a run with save_only_trainable, without what is frozen; the end of the run "
            "saves a complete model (--max_steps moves it), and without save_only_trainable each checkpoint is one"
        )
    if (folder / ADAPTER_FOLDER).is_dir():
        raise FileNotFoundError(
            f"{folder} is a checkpoint of a LoRA run, without the language model; the end of the run saves a "
            "complete model, and --merge_lora_checkpoints makes each checkpoint one"
        )


def holds_only_trained(folder: Path) -> bool:
    """Whether a folder is a checkpoint without the weights that were frozen in its training.

    Raises:
        ValueError: If its weights are damaged; the message names the file.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        return False
    read_header(path)  # names a damaged file
    with safe_open(path, "pt") as file:
        return ONLY_TRAINED.items() <= (file.metadata() or {}).items()


def has_two_encoders(folder: Path) -> bool:
    """Whether captions and reconstructions have encoders of their own. The captioner's is stored apart."""
    if not (folder / INDEX_FILE).is_file():
        return False
    weights = read_weight_map(folder).items()
    return any(name.startswith(ENCODER_PREFIX) and file in CAPTIONER_WEIGHTS for name, file in weights)


def load_diffusion_components(
    source: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """The components of a text-to-image model that the reconstruction pipeline needs, by their names in diffusers.

    Args:
        source: Text-to-image model or VLV: folder or repo id. A VLV may refer to the text-to-image model that it was
            trained with.
        dtype: Precision of denoiser and autoencoder; by default the stored one.

    Returns:
        For example `unet`, `vae`, `scheduler` and `tokenizer`.

    Raises:
        FileNotFoundError: If there is no such folder or repository, or it holds no text-to-image model.
        ValueError: If its scheduler is not one of diffusers', a file is damaged, or the model that it refers to has
            changed.
    """
    folder = diffusion_model_folder(source, DIFFUSION_FILES, revision=revision, token=token)
    return load_components(folder, find_family(read_json(folder / MODEL_INDEX_FILE), folder / MODEL_INDEX_FILE), dtype)


def diffusion_model_folder(
    source: str | os.PathLike, allow_patterns: list[str], *, revision: str | None = None, token: str | None = None
) -> Path:
    """The folder of a text-to-image model: `source`, or what the VLV `source` refers to.

    Args and errors are those of `resolve`.
    """
    folder = resolve(source, revision=revision, token=token, allow_patterns=allow_patterns, pickles_allowed=True)
    require(folder, MODEL_INDEX_FILE)
    if (referred := referred_diffusion_model(folder)) is None:
        return folder
    referred.check(source)
    return diffusion_model_folder(referred.source, allow_patterns, revision=referred.revision, token=token)
