"""What a run leaves, in `output_dir` and in each checkpoint: a model in the Hub layout, with its code."""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.integrations import deepspeed

from vlv import VLVForConditionalGeneration, VLVModel, hub
from vlv.hub.layout import ADAPTER_FOLDER, ENCODER_PREFIX, INDEX_FILE, ONLY_TRAINED, WEIGHTS_FILE
from vlv.hub.load import read_weight_map

from .encoder_lora import adapted_weights, has_encoder_lora, merged_encoder_weights, save_encoder_adapter
from .lora import (
    LANGUAGE_MODEL_PREFIX,
    dequantised_weights,
    has_lora,
    is_4bit,
    load_adapter,
    merged_weights,
    read_adapter,
    save_adapter,
)


@dataclass
class Provenance:
    """Where a run comes from.

    Attributes:
        stage: `"stage1"`, `"stage2"` or `"stage3"`.
        start: Folder or repo id of the VLV that it starts from, if any.
        diffusion_model: The text-to-image model that decodes the caption embeddings, if it is known.
        sources: Names of data and pretrained models for `training.json`, such as `images` and `image_encoder`.
        fingerprints: Fingerprints of those, by the same names.
    """

    stage: str
    start: str | None = None
    diffusion_model: hub.DiffusionModel | None = None
    sources: dict[str, Any] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)

    @cached_property
    def encoder(self) -> tuple[VLVModel, Any]:
        """The encoder of `start` for reconstructions, on the CPU, and its image processor; read once."""
        assert self.start is not None
        with loading_whole_models():
            return hub.load_encoder(self.start)


@contextlib.contextmanager
def loading_whole_models() -> Iterator[None]:
    """Models that are loaded are whole.

    Under ZeRO-3, transformers shards each model while it is loaded, which waits for all processes and leaves
    parameters of no elements. DeepSpeed shards whole models by itself, when the training begins.
    """
    reference = deepspeed._hf_deepspeed_config_weak_ref
    config = None if reference is None else reference()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


def write_model(
    folder: str | Path,
    model: VLVModel | VLVForConditionalGeneration,
    processor: Any,
    provenance: Provenance | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes a model in the Hub layout.

    The text-to-image model stays where it is, and the folder refers to it. LoRA layers are merged into the weights
    that are written, and are written by themselves as well, in peft's format. Where stage 2 changes the encoder,
    reconstructions keep the encoder that the run started from.

    Args:
        processor: The image processor of a `VLVModel`, the processor of a captioner.
        weights: All weights of the model, instead of those that it holds (for example, shards).

    Raises:
        OSError: If the disk is too small.
    """
    diffusion_model = provenance.diffusion_model if provenance is not None else None
    if isinstance(model, VLVModel):
        if has_encoder_lora(model):
            weights = dict(model.state_dict() if weights is None else weights)
            save_encoder_adapter(model, weights, Path(folder) / ADAPTER_FOLDER)
            weights = merged_encoder_weights(model, weights)
        hub.export(folder, encoder=model, image_processor=processor, diffusion_model=diffusion_model, weights=weights)
        return
    if has_lora(model):
        weights = dict(model.state_dict() if weights is None else weights)
        save_adapter(model, weights, Path(folder) / ADAPTER_FOLDER)
        if is_4bit(model):
            weights = dequantised_weights(model, weights)
        weights = merged_weights(model, weights)
    encoder = image_processor = None
    if provenance is not None and provenance.start is not None and _encoder_differs(model, provenance.start):
        encoder, image_processor = provenance.encoder
    hub.export(
        folder,
        encoder=encoder,
        image_processor=image_processor,
        captioner=model,
        processor=processor,
        diffusion_model=diffusion_model,
        weights=weights,
    )


def write_partial_checkpoint(
    folder: str | Path,
    model: VLVModel | VLVForConditionalGeneration,
    weights: Mapping[str, torch.Tensor] | None = None,
    trained: Collection[str] | None = None,
) -> None:
    """Writes LoRA layers in peft's format, and of the other weights those that are trained.

    The folder is not a model by itself: it has no `config.json`.

    Args:
        weights: All weights of the model, instead of those that it holds (for example, shards).
        trained: Names of the parameters that are trained. By default all weights outside of the language model are
            written, which is frozen in a LoRA run.
    """
    weights = model.state_dict() if weights is None else weights
    adapter = Path(folder) / ADAPTER_FOLDER
    adapter.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(model, VLVModel):
        if has_encoder_lora(model):
            save_encoder_adapter(model, weights, adapter)
    elif has_lora(model):
        save_adapter(model, weights, adapter)
    tied = model.all_tied_weights_keys or {}
    names = {name for name in weights if name not in tied and ".lora_" not in name}
    names = {n for n in names if not n.startswith(LANGUAGE_MODEL_PREFIX)} if trained is None else names & set(trained)
    tensors = {name: weights[name].detach().cpu().contiguous() for name in sorted(names)}
    contents = {} if trained is None else ONLY_TRAINED
    save_file(tensors, Path(folder) / WEIGHTS_FILE, metadata={"format": "pt", **contents})


def _encoder_differs(model: VLVForConditionalGeneration, start: str) -> bool:
    """Whether captions and reconstructions have encoders of their own after stage 2."""
    trained = any(parameter.requires_grad for parameter in model.model.parameters())
    return trained or hub.has_two_encoders(hub.resolve(start, allow_patterns=[INDEX_FILE]))


def read_weights(folder: str | Path, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint that `write_model` or `save_pretrained` wrote, under the names that a model has.

    Tied weights have one of their names. Of a model with LoRA layers, the weights of the language model or of
    Florence-2 are left out: they are frozen, and those in the checkpoint are merged.
    """
    root = Path(folder)
    if (root / INDEX_FILE).is_file():
        files = read_weight_map(root)
    else:
        files = {}
        for path in sorted(root.glob("model*.safetensors")):
            with safe_open(path, "pt") as tensors:
                files |= dict.fromkeys(tensors.keys(), path.name)
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(set(files.values())):
        with safe_open(root / file, "pt") as tensors:
            weights |= {name: tensors.get_tensor(name) for name in files if files[name] == file}
    if isinstance(model, VLVModel):
        weights = {name.removeprefix(ENCODER_PREFIX): tensor for name, tensor in weights.items()}
    if has_encoder_lora(model):
        return adapted_weights(weights, read_adapter(root / ADAPTER_FOLDER))
    if has_lora(model):
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(LANGUAGE_MODEL_PREFIX)}
        weights |= load_adapter(root / ADAPTER_FOLDER)
    return weights
