"""Loads the reconstruction pipeline from a folder or a Hub repository without running code of the repository."""

import os
from pathlib import Path
from typing import Any, TypeAlias

import torch

from vlv import VLVModel, hub
from vlv.diffusion_decoder import family_of_components

from . import components as _components  # noqa: F401 (from_pretrained of the pipelines loads them)
from .pipeline_vlv_pooled_reconstruction import VLVPooledReconstructionPipeline
from .pipeline_vlv_reconstruction import VLVReconstructionPipeline

ReconstructionPipeline: TypeAlias = VLVReconstructionPipeline | VLVPooledReconstructionPipeline
PIPELINES = {pipeline.__name__: pipeline for pipeline in (VLVReconstructionPipeline, VLVPooledReconstructionPipeline)}


def build_reconstruction(
    encoder: VLVModel,
    image_processor: Any,
    components: dict[str, Any],
    model: str = "the model",
    source: str = "the text-to-image model",
) -> ReconstructionPipeline:
    """The reconstruction pipeline of the family that the components of a text-to-image model belong to.

    Args:
        components: As `vlv.hub.load_diffusion_components` returns them.
        model, source: Names of the VLV and of the text-to-image model, for messages.

    Raises:
        ValueError: If the components belong to no family, the encoder to another, or a tokenizer to another encoder.
    """
    family = family_of_components(components, source)
    family.check_components(components, encoder.config, model, source)
    pipeline = PIPELINES[family.reconstruction_pipeline[1]]
    return pipeline(encoder=encoder, image_processor=image_processor, **components)


def load_reconstruction(
    source: str | os.PathLike, *, revision: str | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> ReconstructionPipeline:
    """Loads each component and assembles the reconstruction pipeline.

    Args:
        source: A folder in the Hub's layout, one that the pipeline's `save_pretrained` wrote, or a repo id.
        revision: Branch, tag or commit of the repo.
        dtype: Precision of all components.
        device: Where the pipeline runs.

    Raises:
        FileNotFoundError: If there is no such folder or repo, it holds no diffusion model, or it was saved with a
            `variant` alone.
        ValueError: If a file is damaged, or a weight is missing, unexpected, of another shape, or pickled.
    """
    folder = hub.resolve(source, revision=revision, allow_patterns=hub.PIPELINE_FILES)
    _refuse_variant(folder)
    encoder, image_processor = hub.load_encoder(folder, dtype=dtype)
    components = hub.load_diffusion_components(folder, dtype=dtype)
    return build_reconstruction(encoder, image_processor, components, str(source), "its text-to-image model").to(
        device
    )


def _refuse_variant(folder: Path) -> None:
    """Raises `FileNotFoundError` if the weights of a saved pipeline have names such as `model.fp16.safetensors`."""
    names = sorted(path.name for path in (folder / "encoder").glob("model*.safetensors"))
    variants = [name for name in names if name.startswith("model.") and name != "model.safetensors"]
    if variants and variants == names:
        variant = variants[0].split(".")[1].split("-")[0]
        raise FileNotFoundError(
            f"{folder} holds only the variant {variant!r} of the weights, such as encoder/{variants[0]}; load it with "
            f"VLVReconstructionPipeline.from_pretrained({str(folder)!r}, variant={variant!r}, dtype=torch.float32)"
        )
