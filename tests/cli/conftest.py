"""A complete, untrained VLV in the Hub's layout, and a folder of readable and unreadable images."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlv import VLVForConditionalGeneration, hub

from ..builders import language_model_config, vlv_config, with_text_encoder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, processor, stable_diffusion) -> Path:
    torch.manual_seed(0)
    captioner = VLVForConditionalGeneration(vlv_config(text_config=language_model_config()))
    with_text_encoder(captioner.model)
    folder = tmp_path_factory.mktemp("vlv")
    return hub.export(folder, captioner=captioner, processor=processor, diffusion_model=stable_diffusion)


@pytest.fixture
def mixed_folder(tmp_path, images) -> Path:
    """Five images in formats that readers often fail on, three files that cannot be read, and one text file."""
    folder = tmp_path / "mixed"
    (folder / "sub").mkdir(parents=True)
    images[0].save(folder / "good.png")
    images[1].convert("CMYK").save(folder / "sub" / "cmyk.JPG")
    Image.fromarray((np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)).save(folder / "sixteen.png")
    palette = images[2].convert("P")
    palette.info["transparency"] = 0
    palette.save(folder / "palette.png", transparency=0)
    Image.new("RGB", (1, 3000), "red").save(folder / "sub" / "good.png")
    images[3].save(folder / "truncated.jpg", quality=95)
    data = (folder / "truncated.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(data[: len(data) // 2])
    (folder / "text.png").write_text("not an image")
    (folder / "empty.webp").touch()
    (folder / "notes.txt").write_text("has no suffix of an image")
    return folder


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 256 KiB, where mounting is permitted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)
