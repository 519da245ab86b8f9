"""The reconstruction pipeline out of a folder or Hub repository, without running any code of the repository."""

import json
import os
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import AutoTokenizer

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
    hub.require(folder, "model_index.json")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    encoder, image_processor = hub.load_encoder(folder, dtype=dtype)
    shared = {"torch_dtype": dtype, "use_safetensors": True}
    pipeline = VLVReconstructionPipeline(
        encoder=encoder,
        vae=AutoencoderKL.from_pretrained(folder, subfolder="vae", **shared),
        unet=UNet2DConditionModel.from_pretrained(folder, subfolder="unet", **shared),
        scheduler=_load_scheduler(folder, index["scheduler"][1]),
        image_processor=image_processor,
        tokenizer=AutoTokenizer.from_pretrained(folder, subfolder="tokenizer"),
    )
    return pipeline.to(device)


def _load_scheduler(folder: Path, name: str) -> diffusers.SchedulerMixin:
    scheduler = getattr(diffusers, name, None)
    if scheduler is None:
        raise ValueError(f"{folder / 'model_index.json'} names the scheduler {name!r}, which diffusers does not have")
    return scheduler.from_pretrained(folder, subfolder="scheduler")
