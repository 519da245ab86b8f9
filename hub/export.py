"""Exports encoder, captioner and diffusion model into one folder in the Hub layout."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from vlv.diffusion_decoder import family_of_components
from vlv.files import is_variant, require_space, set_default_permissions, write_json
from vlv.modeling_vlv import VLVConfig, VLVModel
from vlv.modeling_vlv_captioner import VLVForConditionalGeneration
from vlv.processing_vlv import VLVImageProcessor
from vlv.processing_vlv_captioner import VLVProcessor

from .compatibility import check_compatible
from .decoder import DiffusionModel, has_own_diffusion_model, refer_to
from .layout import (
    CAPTIONER_ENCODER_FILE,
    CAPTIONER_FILE,
    CAPTIONER_ONLY,
    CAPTIONER_WEIGHTS,
    ENCODER_FILE,
    ENCODER_PREFIX,
    HALF_INDEX_FILE,
    INDEX_FILE,
    MODEL_INDEX_FILE,
    PIPELINE_PARTS,
    half_name,
    reconstruction_classes,
)
from .load import load_diffusion_components
from .remote_code import add_code


def export(
    folder: str | os.PathLike,
    *,
    encoder: VLVModel | None = None,
    captioner: VLVForConditionalGeneration | None = None,
    processor: VLVProcessor | None = None,
    image_processor: VLVImageProcessor | None = None,
    diffusion_model: str | os.PathLike | diffusers.DiffusionPipeline | dict[str, Any] | DiffusionModel | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
    half_variant: bool = False,
) -> Path:
    """Writes a VLV model in the Hub layout.

    Args:
        folder: An earlier model in it is replaced. Its diffusion model stays if none is given.
        encoder: A stage-1 model. Not needed with a captioner, which has an encoder of its own. If both are given, this
            one serves reconstruction and the captioner's own serves captioning. Of the captioner's encoder, only
            weights that differ are stored.
        captioner: Without it the folder reconstructs but does not caption.
        processor: Of the captioner; required with it.
        image_processor: Of the encoder; by default the processor's.
        diffusion_model: A diffusers pipeline, its components, or the folder or repo id of one. Its denoiser,
            autoencoder, scheduler and tokenizers are written. To a `DiffusionModel` the folder only refers.
        weights: All weights of the captioner, or of the encoder if there is no captioner, instead of those that the
            model holds: for example of a model whose weights are sharded over processes.
        dtype: Precision of the stored weights; by default their own. They load as float32 unless the reader asks for
            another precision.
        half_variant: Also writes the weights in half precision, for `variant="fp16"`.

    Returns:
        The folder.

    Raises:
        ValueError: If captioner and processor, or encoder and image processor, are not given together, `weights` is
            empty, or the folder `diffusion_model` does not fit the encoder (`check_compatible`).
        OSError: If the disk is too small for the weights. An earlier model in the folder is then unchanged.
    """
    root = Path(folder)
    if captioner is not None:
        encoder = captioner.model if encoder is None else encoder
        if processor is None:
            raise ValueError("a captioner needs its processor; pass processor=")
        image_processor = image_processor or processor.image_processor
    if encoder is None or image_processor is None:
        raise ValueError("pass captioner and processor, or encoder and image_processor")
    if weights is not None and not weights:
        raise ValueError("weights is empty; pass all weights of the model, or none to take those that it holds")
    components: dict[str, Any] = {}
    if diffusion_model is not None and not isinstance(diffusion_model, DiffusionModel):
        components = _diffusion_components(diffusion_model)  # before anything is written
        if isinstance(diffusion_model, (str, os.PathLike)):
            check_compatible(encoder, components, "the model", diffusion_model)
        else:
            family = family_of_components(components, "diffusion_model")
            family.check_components(components, encoder.config, "the model", "diffusion_model")
    modules = [encoder, captioner, *components.values()]
    require_space(root, _size([module for module in modules if isinstance(module, torch.nn.Module)], dtype))
    (root / "encoder").mkdir(parents=True, exist_ok=True)
    _remove_stale_files(root, captions=captioner is not None)

    captioner_weights = captioner.state_dict() if captioner is not None and weights is None else weights or {}
    encoder_weights: Mapping[str, torch.Tensor] = {}
    if captioner is None and weights is not None:
        encoder_weights = {ENCODER_PREFIX + name: tensor for name, tensor in weights.items()}
    elif captioner is not None and encoder is captioner.model:
        encoder_weights = {name: t for name, t in captioner_weights.items() if name.startswith(ENCODER_PREFIX)}
    else:
        encoder_weights = {ENCODER_PREFIX + name: tensor for name, tensor in encoder.state_dict().items()}
    tensors = {name: _stored(tensor, dtype) for name, tensor in encoder_weights.items()}
    _save(_without_ties(tensors, encoder, ENCODER_PREFIX), root / ENCODER_FILE)
    config = VLVConfig(**{**encoder.config.to_dict(), "text_config": None, "instructions": None})
    _write_config(config, "VLVModel", root / "encoder" / "config.json")
    if captioner is not None and processor is not None:
        _export_captioner(root, encoder_weights, captioner, captioner_weights, processor, dtype)
    else:
        _write_config(config, "VLVModel", root / "config.json")
        write_json(root / INDEX_FILE, _index(root, [ENCODER_FILE]))
        image_processor.save_pretrained(root)
    image_processor.save_pretrained(root / "image_processor")
    if isinstance(diffusion_model, DiffusionModel):
        for name in PIPELINE_PARTS:
            shutil.rmtree(root / name, ignore_errors=True)
        refer_to(root, diffusion_model)
    elif components:
        _export_diffusion_components(root, components, dtype)
    add_code(root)
    if half_variant:
        _add_half_variant(root)
    return root


def add_diffusion_model(folder: str | os.PathLike) -> None:
    """Copies the text-to-image model that a folder in the Hub layout refers to into it.

    Raises:
        FileNotFoundError: If the folder names none, or it is not where it was.
        ValueError: If it has changed.
    """
    root = Path(folder)
    if not has_own_diffusion_model(root):
        _export_diffusion_components(root, load_diffusion_components(root), None)
        add_code(root)


def _size(modules: list[torch.nn.Module], dtype: torch.dtype | None) -> int:
    """Bytes of the parameters of some modules. Those that several modules share count once."""
    parameters = {id(p): p for module in modules for p in module.parameters()}.values()
    return sum(p.numel() * (p.dtype if dtype is None else dtype).itemsize for p in parameters)


def _remove_stale_files(root: Path, captions: bool) -> None:
    """Deletes files of an earlier model that this one will not overwrite."""
    folders = (root, root / "encoder")  # the diffusion model's folders are replaced with it
    old = [path for folder in folders for path in folder.glob("*.safetensors*") if is_variant(path.name)]
    old += [root / name for name in CAPTIONER_WEIGHTS]
    if not captions:
        old += [root / name for name in CAPTIONER_ONLY]
    for path in old:
        path.unlink(missing_ok=True)


def _export_captioner(
    root: Path,
    shared: Mapping[str, torch.Tensor],
    captioner: VLVForConditionalGeneration,
    weights: Mapping[str, torch.Tensor],
    processor: VLVProcessor,
    dtype: torch.dtype | None,
) -> None:
    """Writes the captioner's `weights` that are not those of the encoder, `shared`, and all its other files."""
    rest = {
        name: _stored(tensor, dtype)
        for name, tensor in weights.items()
        if name not in shared or not _same(tensor, shared[name])
    }
    files = [CAPTIONER_FILE, ENCODER_FILE]
    rest = _without_ties(rest, captioner, "")
    own_encoder = {name: rest.pop(name) for name in list(rest) if name.startswith(ENCODER_PREFIX)}
    _save(rest, root / CAPTIONER_FILE)
    if own_encoder:
        _save(own_encoder, root / CAPTIONER_ENCODER_FILE)
        files.append(CAPTIONER_ENCODER_FILE)
    write_json(root / INDEX_FILE, _index(root, files))
    config = copy.deepcopy(captioner.config)
    if config.image_token_id is None:
        config.image_token_id = processor.image_token_id
    _write_config(config, "VLVForConditionalGeneration", root / "config.json")
    captioner.generation_config.save_pretrained(root)
    processor.save_pretrained(root)
    processor.image_processor.save_pretrained(root)


def _diffusion_components(
    diffusion_model: str | os.PathLike | diffusers.DiffusionPipeline | dict[str, Any],
) -> dict[str, Any]:
    if isinstance(diffusion_model, diffusers.DiffusionPipeline):
        return {**diffusion_model.config, **diffusion_model.components}
    return diffusion_model if isinstance(diffusion_model, dict) else load_diffusion_components(diffusion_model)


def _export_diffusion_components(root: Path, components: dict[str, Any], dtype: torch.dtype | None) -> None:
    present = {name: component for name, component in components.items() if component is not None}
    entries = {name: [_library(component), type(component).__name__] for name, component in present.items()}
    family = family_of_components(components, "the diffusion model")
    for name in PIPELINE_PARTS:
        shutil.rmtree(root / name, ignore_errors=True)
        if name not in family.component_names() or name not in present:
            continue
        component = components[name]
        if dtype is not None and name in family.models:
            original_dtype = component.dtype
            component.to(dtype).save_pretrained(root / name)
            component.to(original_dtype)
        else:
            component.save_pretrained(root / name)
        set_default_permissions(*(root / name).glob("*.safetensors"))
        _remove_origin(root / name / "config.json")
    own = (CAPTIONER_FILE, CAPTIONER_ENCODER_FILE)
    index = {
        "_diffusers.__version__": diffusers.__version__,
        **reconstruction_classes(family),
        **{name: entries[name] for name in sorted(family.component_names()) if name in present},
        **{name: components.get(name, default) for name, default in family.pipeline_settings.items()},
        "_ignore_files": [INDEX_FILE, HALF_INDEX_FILE, *own, *map(half_name, own)],
    }
    write_json(root / MODEL_INDEX_FILE, index)


def _library(component: Any) -> str:
    return "transformers" if isinstance(component, PreTrainedTokenizerBase) else "diffusers"


def _add_half_variant(root: Path) -> None:
    """Writes the half-precision files that `variant="fp16"` loads, beside each weight file and each index."""
    weights = [path for path in root.rglob("*.safetensors") if not is_variant(path.name)]
    for path in weights:
        tensors = {name: _stored(tensor, torch.float16) for name, tensor in load_file(path).items()}
        _save(tensors, path.with_name(half_name(path.name)))
    for path in [p for p in root.rglob("*.safetensors.index.json") if not is_variant(p.name)]:
        index = json.loads(path.read_text(encoding="utf-8"))
        weight_map = {
            key: str(Path(name).with_name(half_name(Path(name).name))) for key, name in index["weight_map"].items()
        }
        size = sum((path.parent / name).stat().st_size for name in set(weight_map.values()))
        write_json(
            path.with_name(path.name.replace(".index.json", ".index.fp16.json")),
            {"metadata": {"total_size": size}, "weight_map": weight_map},
        )


def _remove_origin(path: Path) -> None:
    """Removes the local path that diffusers writes into a component's configuration."""
    if path.is_file():
        values = json.loads(path.read_text(encoding="utf-8"))
        values.pop("_name_or_path", None)
        write_json(path, values)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether a captioner's weight equals the encoder's, which may have a higher precision."""
    other = other.to(one.device, one.dtype)
    return one is other or (one.data_ptr() == other.data_ptr() and one.shape == other.shape) or torch.equal(one, other)


def _stored(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    tensor = tensor.detach().cpu()
    return (tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor).contiguous()


def _without_ties(tensors: dict[str, torch.Tensor], model: Any, prefix: str) -> dict[str, torch.Tensor]:
    """Leaves out names that the model ties to another weight when it loads."""
    tied = {prefix + name for name in (getattr(model, "all_tied_weights_keys", None) or {})}
    return {name: tensor for name, tensor in tensors.items() if name not in tied}


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    set_default_permissions(path)


def _index(root: Path, files: list[str]) -> dict[str, Any]:
    weight_map, total = {}, 0
    for name in files:
        with safe_open(root / name, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a mapping)
                weight_map[key] = name
                total += tensors.get_tensor(key).nbytes
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _write_config(config: VLVConfig, architecture: str, path: Path) -> None:
    values = json.loads(config.to_json_string(use_diff=True))
    for part in values.values():  # local paths of the exporter do not belong into the repository
        if isinstance(part, dict):
            part.pop("_name_or_path", None)
    values |= {"architectures": [architecture], "dtype": "float32"}
    write_json(path, values)
