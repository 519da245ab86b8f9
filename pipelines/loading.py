"""Loads the reconstruction pipeline from a folder or a Hub repository without running code of the repository."""

import os

import torch

from vlv import hub

from .pipeline_vlv_reconstruction import VLVReconstructionPipeline


def load_reconstruction(
    source: str | os.PathLike, *, revision: str | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> VLVReconstructionPipeline:
    """Loads each component and assembles the reconstruction pipeline.

    Args:
        source: A folder in the Hub's layout, or a repo id.
        revision: Branch, tag or commit of the repo.
        dtype: Precision of all components.
        device: Where the pipeline runs.

    Raises:
        FileNotFoundError: If there is no such folder or repo, or it holds no diffusion model.
    """
    folder = hub.resolve(source, revision=revision, allow_patterns=hub.PIPELINE_FILES)
    encoder, image_processor = hub.load_encoder(folder, dtype=dtype)
    components = hub.load_diffusion_components(folder, dtype=dtype)
    return VLVReconstructionPipeline(encoder=encoder, image_processor=image_processor, **components).to(device)
