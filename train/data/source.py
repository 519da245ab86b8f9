"""What every source of training data offers: rows by number, the number of captions of each, a fingerprint."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset

MAX_STREAMS = 8
"""Shards that the processes of one rank read at a time."""


class EncodedImage(bytes):
    """An image file in memory, with the name that messages use."""

    name: str = ""

    @classmethod
    def named(cls, data: bytes, name: str) -> "EncodedImage":
        image = cls(data)
        image.name = name
        return image

    def __reduce__(self):
        return EncodedImage.named, (bytes(self), self.name)


@dataclass(frozen=True)
class UnreadableImage:
    """Takes the place of an image that could not be read from its source; the collator counts it.

    Args:
        name: What messages call the image.
        reason: Why it could not be read.
    """

    name: str
    reason: str


class Source(Dataset):
    """Images, with captions or without, that are read by the number of their row.

    `source[number]` is `{"image": ..., "caption": text or list of texts, "prompt": instruction}`, the caption and the
    instruction only where there is one. The collator opens the images. A row that cannot be read raises `OSError` or
    `ValueError`.
    """

    has_captions = False
    has_prompts = False
    num_streams = MAX_STREAMS
    """How many shards are read at a time at most."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, number: int) -> dict[str, Any]:
        raise NotImplementedError

    def caption(self, number: int) -> Any:
        """The caption of `source[number]`."""
        return self[number]["caption"]

    def prompt(self, number: int) -> Any:
        """The instruction of `source[number]`, where it has one."""
        return self[number].get("prompt") if self.has_prompts else None

    def name(self, number: int) -> str:
        """What messages call a row."""
        return f"row {number}"

    def shard_sizes(self) -> Sequence[int]:
        """Numbers of the consecutive rows that lie together; empty if every row is read at the same cost."""
        return ()

    def count_captions(self) -> np.ndarray:
        """`(rows,)`: number of captions with words in each row, or `NOT_TEXT`."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """A hash of the content, as far as it can be told without reading all of it, whatever the folder."""
        raise NotImplementedError


def hash_files(files: Sequence[str | os.PathLike], details: Sequence[Any]) -> str:
    """A hash of files by their names below the folder that they share, their sizes, and a detail of each."""
    root = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
    digest = hashlib.sha256()
    for file, detail in zip(files, details, strict=True):
        name = os.path.relpath(os.path.abspath(file), root)
        digest.update(repr((name, os.stat(file).st_size, detail)).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
