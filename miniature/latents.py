"""Scenes as latents: the autoencoder is frozen, so each scene is encoded once and read many times."""

import os
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from .data import SceneDataset

CHUNK = 1024  # scenes in a file


@torch.no_grad()
def encode_scenes(autoencoder: AutoencoderKL, scenes: SceneDataset, folder: str | Path) -> torch.Tensor:
    """The mean latents `(len(scenes), C, 8, 8)` of scenes, float16, without scale or shift.

    Args:
        folder: For files of `CHUNK` scenes. Those that exist are read, so an interrupted run resumes.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    chunks = []
    for start in range(0, len(scenes), CHUNK):
        path = Path(folder) / f"latents-{start // CHUNK:04d}.safetensors"
        if not path.exists():
            batches = []
            for first in range(start, min(start + CHUNK, len(scenes)), 64):
                indices = range(first, min(first + 64, start + CHUNK, len(scenes)))
                pixels = torch.stack([scenes[index]["pixels"] for index in indices])
                batches.append(autoencoder.encode(pixels.float() / 127.5 - 1).latent_dist.mean.half())
            save_file({"latents": torch.cat(batches)}, f"{path}.part")
            os.replace(f"{path}.part", path)
        chunks.append(load_file(path)["latents"])
    return torch.cat(chunks)
