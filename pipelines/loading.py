"""The reconstruction pipeline out of a folder or Hub repository, without running any code of the repository."""

import os

import torch

from vlv import hub

from .pipeline_vlv_reconstruction import VLVReconstructionPipeline


def load_reconstruction(
    source: str | os.PathLike, *, revision: str | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> VLVReconstructionPipeline:
    """Assembles the pipeline from its parts.

    Args:
        source: A folder in the Hub's layout, or a repo id.
        dtype: Of all parts.

    Raises:
        FileNotFoundError: If there is no such folder, or it has no decoder in it.
    """
    folder = hub.resolve(source, revision=revision, allow_patterns=hub.PIPELINE_FILES)
    encoder, image_processor = hub.load_encoder(folder, dtype=dtype)
    parts = hub.load_diffusion_components(folder, dtype=dtype)
    return VLVReconstructionPipeline(encoder=encoder, image_processor=image_processor, **parts).to(device)
