"""Scenes as latents: the autoencoder is frozen, so each scene is encoded once and read many times."""

import os
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from .data import SceneDataset

SCENES = 10_240
CHUNK = 1024  # scenes in a file
BATCH = 64
SCENE_SEED = 1


def latents_file(folder: str | Path, chunk: int) -> Path:
    """The file of the chunk with this number."""
    return Path(folder) / f"latents-{chunk:04d}.safetensors"


@torch.no_grad()
def encode_scenes(
    output_dir: str | Path, work_dir: str | Path, autoencoder_dir: str | Path, scenes: int = SCENES
) -> None:
    """Writes the mean latents of scenes of `train`, `(CHUNK, C, 8, 8)` float16 in a file, without scale or shift.

    Files that exist are kept, so an interrupted run resumes.

    Args:
        work_dir: Not used.
        scenes: Their number.
    """
    autoencoder = AutoencoderKL.from_pretrained(autoencoder_dir).eval()
    data = SceneDataset(scenes, seed=SCENE_SEED)
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    for start in range(0, scenes, CHUNK):
        path = latents_file(output_dir, start // CHUNK)
        if path.exists():
            continue
        indices = torch.arange(start, min(start + CHUNK, scenes))
        batches = []
        for batch in indices.split(BATCH):
            pixels = torch.stack([data[int(index)]["pixels"] for index in batch])
            batches.append(autoencoder.encode(pixels.float() / 127.5 - 1).latent_dist.mean.half())
        save_file({"latents": torch.cat(batches)}, f"{path}.part")
        os.replace(f"{path}.part", path)


def load_latents(folder: str | Path) -> torch.Tensor:
    """The latents `(scenes, C, 8, 8)` that `encode_scenes` wrote, in the order of the scenes.

    Raises:
        FileNotFoundError: If the folder has none.
    """
    files = sorted(Path(folder).glob("latents-*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no latents-0000.safetensors; encode the scenes first (encode_scenes)")
    return torch.cat([load_file(file)["latents"] for file in files])
