"""Loads the reconstruction pipeline from a folder or a Hub repository without running code of the repository."""

import os
from pathlib import Path

import torch

from vlv import hub

from .pipeline_vlv_reconstruction import VLVReconstructionPipeline


def load_reconstruction(
    source: str | os.PathLike, *, revision: str | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> VLVReconstructionPipeline:
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
    return VLVReconstructionPipeline(encoder=encoder, image_processor=image_processor, **components).to(device)


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
