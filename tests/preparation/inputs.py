"""Inputs of the steps: metadata in parquet, and small pictures with captions."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet


def metadata(rows: int, seed: int = 0) -> pa.Table:
    """LAION's columns. A tenth of the watermark probabilities are missing."""
    random = np.random.default_rng(seed)
    columns = {
        "URL": [f"https://images.example/{seed}/{number}.jpg" for number in range(rows)],
        "TEXT": ["a" * int(length) for length in random.integers(0, 100, rows)],
        "WIDTH": random.integers(0, 2000, rows),
        "HEIGHT": random.integers(100, 2000, rows),
        "pwatermark": pa.array(random.random(rows), mask=random.random(rows) < 0.1),
        "AESTHETIC_SCORE": random.normal(5.5, 1, rows),
    }
    return pa.table(columns)


def write_metadata(path: Path, rows: int, seed: int = 0) -> Path:
    parquet.write_table(metadata(rows, seed), path, row_group_size=max(1, rows // 3))
    return path


def write_pictures(folder: Path, number: int, side: int = 32, seed: int = 0) -> Path:
    """PNG files `00.png`, ... of smooth noise, all different, with a caption in a `.txt` beside each."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name in range(number):
        small = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{name:02d}.png")
        (folder / f"{name:02d}.txt").write_text(f"picture number {name}\n")
    return folder


def write_urls(path: Path, urls: Sequence[str]) -> Path:
    """A table of URLs with the captions `picture 0`, ..."""
    parquet.write_table(pa.table({"url": urls, "caption": [f"picture {n}" for n in range(len(urls))]}), path)
    return path


def write_downloader(path: Path) -> Path:
    """The program of `downloader.py`."""
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).with_name("downloader.py")}" "$@"\n')
    path.chmod(0o755)
    return path
