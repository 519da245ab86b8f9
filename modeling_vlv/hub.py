"""One folder, or Hub repository, out of encoder, captioner and decoder; and loading it back from its parts.

The layout serves transformers and diffusers at once, and holds each weight once:

    config.json, generation_config.json, model.safetensors.index.json, language_model.safetensors    the captioner
    processor_config.json, tokenizer*.json, chat_template.jinja                                      its processor
    model_index.json, unet/, vae/, scheduler/, tokenizer/, image_processor/                          the reconstruction
    encoder/config.json, encoder/model.safetensors                                                   shared by both
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoTokenizer

from .modeling_vlv import VLVConfig, VLVForConditionalGeneration, VLVModel
from .processing_vlv import VLVImageProcessor, VLVProcessor

ENCODER_PREFIX = VLVForConditionalGeneration.base_model_prefix + "."
LANGUAGE_MODEL_FILE = "language_model.safetensors"  # deliberately not model*.safetensors, which diffusers would fetch
PIPELINE_PARTS = ("unet", "vae", "scheduler", "tokenizer")


CAPTIONER_FILES = ["*.json", "*.jinja", "*.txt", "encoder/*", "model*.safetensors", LANGUAGE_MODEL_FILE]
ENCODER_FILES = ["*.json", "encoder/*"]
PIPELINE_FILES = ["model_index.json", "*_config.json", "encoder/*", *(f"{part}/*" for part in PIPELINE_PARTS)]
PICKLES = ["*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt"]


def resolve(
    source: str | os.PathLike, *, revision: str | None = None, allow_patterns: list[str] | None = None
) -> Path:
    """The local folder of a model: itself, or a download of what is asked for of the repository `source`.

    Raises:
        FileNotFoundError: If `source` looks like a path and is no folder.
    """
    path = Path(source)
    if path.is_dir():
        return path
    text = os.fspath(source)
    if text.startswith((".", "/", "~")) or text.count("/") != 1 or path.exists():
        raise FileNotFoundError(f"{text} is neither a folder with a model nor a repo id like org/name")
    try:
        return _download(text, revision, allow_patterns)
    except (RepositoryNotFoundError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"there is no folder {text}, and as a Hub repository it cannot be had: {error}"
        ) from error


def _download(repo: str, revision: str | None, allow_patterns: list[str] | None) -> Path:
    return Path(snapshot_download(repo, revision=revision, allow_patterns=allow_patterns, ignore_patterns=PICKLES))


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
    processor = VLVProcessor(
        VLVImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder, use_fast=True)
    )
    return model.to(device).eval(), processor


def load_encoder(
    source: str | os.PathLike, *, revision: str | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[VLVModel, VLVImageProcessor]:
    """The encoder and its image processor, from a Hub-layout folder or repo id, or from a stage-1 checkpoint."""
    folder = resolve(source, revision=revision, allow_patterns=ENCODER_FILES)
    part = folder / "encoder" if (folder / "encoder" / "config.json").is_file() else folder
    require(part, "config.json")
    model = _load_whole(VLVModel, part, dtype)
    return model.to(device).eval(), VLVImageProcessor.from_pretrained(folder)


def _load_whole(model_class: type, folder: Path, dtype: torch.dtype) -> Any:
    """As `from_pretrained`, but weights that are missing or of another shape are an error, not a random start."""
    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if model_type != VLVConfig.model_type:
        raise ValueError(f"{folder} holds a model of type {model_type!r}, not a VLV")
    try:
        model, report = model_class.from_pretrained(  # type: ignore[attr-defined]
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except SafetensorError as error:
        raise ValueError(f"the weights in {folder} are damaged: {error}") from error
    lacking = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if lacking:
        raise ValueError(f"{len(lacking)} weights of {folder} are missing or of another shape, such as {lacking[0]}")
    return model


def require(folder: Path, name: str) -> None:
    """Raises `FileNotFoundError` if a VLV's folder lacks a file."""
    if not (folder / name).is_file():
        raise FileNotFoundError(
            f"no {name} in {folder}: this is no VLV in the Hub's layout (vlv.hub.export writes it)"
        )


def export(
    folder: str | os.PathLike,
    *,
    encoder: VLVModel | None = None,
    captioner: VLVForConditionalGeneration | None = None,
    processor: VLVProcessor | None = None,
    image_processor: VLVImageProcessor | None = None,
    decoder: str | os.PathLike | DiffusionPipeline | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes a VLV in the Hub's layout.

    Args:
        folder: Written into; what it held before under the same names is replaced.
        encoder: A stage-1 model. Not needed with a captioner, which has one.
        captioner: With its `processor`. Without it the folder reconstructs but does not caption.
        decoder: A diffusers pipeline, or the folder of one, whose UNet, autoencoder, scheduler and tokenizer go in.
        dtype: What the weights are stored in; by default as they are. They load as float32 all the same, unless the
            reader asks for something else.

    Returns:
        The folder.
    """
    root = Path(folder)
    if captioner is not None:
        encoder = captioner.model
        if processor is None:
            raise ValueError("a captioner needs its processor: pass processor=")
        image_processor = image_processor or processor.image_processor
    if encoder is None or image_processor is None:
        raise ValueError("pass captioner and processor, or encoder and image_processor")
    (root / "encoder").mkdir(parents=True, exist_ok=True)

    tensors = {ENCODER_PREFIX + name: _stored(t, dtype) for name, t in encoder.state_dict().items()}
    _save(_without_ties(tensors, encoder, ENCODER_PREFIX), root / "encoder" / "model.safetensors")
    config = VLVConfig(**{**encoder.config.to_dict(), "decoder_config": None})
    _write_config(config, "VLVModel", root / "encoder" / "config.json")
    if captioner is not None and processor is not None:
        _export_captioner(root, captioner, processor, dtype)
    else:
        _write_config(config, "VLVModel", root / "config.json")
        _write_json(root / "model.safetensors.index.json", _index(root, ["encoder/model.safetensors"]))
        image_processor.save_pretrained(root)
    image_processor.save_pretrained(root / "image_processor")
    if decoder is not None:
        _export_decoder(root, decoder, dtype)
    return root


def _export_captioner(
    root: Path, captioner: VLVForConditionalGeneration, processor: VLVProcessor, dtype: torch.dtype | None
) -> None:
    rest = {n: _stored(t, dtype) for n, t in captioner.state_dict().items() if not n.startswith(ENCODER_PREFIX)}
    _save(_without_ties(rest, captioner, ""), root / LANGUAGE_MODEL_FILE)
    _write_json(
        root / "model.safetensors.index.json", _index(root, ["encoder/model.safetensors", LANGUAGE_MODEL_FILE])
    )
    _write_config(captioner.config, "VLVForConditionalGeneration", root / "config.json")
    captioner.generation_config.save_pretrained(root)
    processor.save_pretrained(root)
    processor.image_processor.save_pretrained(root)


def _export_decoder(root: Path, decoder: str | os.PathLike | DiffusionPipeline, dtype: torch.dtype | None) -> None:
    from diffusers import __version__ as diffusers_version

    if not isinstance(decoder, DiffusionPipeline):
        decoder = DiffusionPipeline.from_pretrained(os.fspath(decoder), use_safetensors=True)
    for name in PIPELINE_PARTS:
        part = decoder.components[name]
        shutil.rmtree(root / name, ignore_errors=True)
        if dtype is not None and name in ("unet", "vae"):
            before = part.dtype
            part.to(dtype).save_pretrained(root / name)
            part.to(before)
        else:
            part.save_pretrained(root / name)
        _forget_origin(root / name / "config.json")
    index = {
        "_class_name": ["pipeline_vlv_reconstruction", "VLVReconstructionPipeline"],
        "_diffusers_version": diffusers_version,
        "encoder": ["modeling_vlv", "VLVModel"],
        "image_processor": ["processing_vlv", "VLVImageProcessor"],
        "scheduler": ["diffusers", type(decoder.scheduler).__name__],
        "tokenizer": ["transformers", type(decoder.components["tokenizer"]).__name__],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "_ignore_files": ["model.safetensors.index.json", LANGUAGE_MODEL_FILE],
    }
    _write_json(root / "model_index.json", index)


def _forget_origin(path: Path) -> None:
    """Takes the exporter's own path out of a part's configuration, where diffusers leaves it."""
    if path.is_file():
        values = json.loads(path.read_text(encoding="utf-8"))
        values.pop("_name_or_path", None)
        _write_json(path, values)


def _stored(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    tensor = tensor.detach().cpu()
    return (tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor).contiguous()


def _without_ties(tensors: dict[str, torch.Tensor], model: Any, prefix: str) -> dict[str, torch.Tensor]:
    """Leaves out names that the model ties to another one on loading."""
    tied = {prefix + name for name in (getattr(model, "all_tied_weights_keys", None) or {})}
    return {name: tensor for name, tensor in tensors.items() if name not in tied}


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})


def _index(root: Path, files: list[str]) -> dict[str, Any]:
    from safetensors import safe_open

    weight_map, total = {}, 0
    for name in files:
        with safe_open(root / name, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (no mapping)
                weight_map[key] = name
                total += tensors.get_tensor(key).nbytes
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _write_config(config: VLVConfig, architecture: str, path: Path) -> None:
    values = json.loads(config.to_json_string(use_diff=True))
    values |= {"architectures": [architecture], "dtype": "float32"}
    _write_json(path, values)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
