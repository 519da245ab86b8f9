"""Rows of a source that are held back from training, for evaluation."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from .source import Source


class SelectedRows(Source):
    """Some rows of a source, in its order.

    Args:
        rows: Numbers of rows of `source`, in ascending order.
    """

    def __init__(self, source: Source, rows: np.ndarray):
        self.source, self.rows = source, rows
        self.has_captions, self.has_prompts = source.has_captions, source.has_prompts
        self.num_streams = source.num_streams

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.source[int(self.rows[number])]

    def caption(self, number: int) -> Any:
        return self.source.caption(int(self.rows[number]))

    def prompt(self, number: int) -> Any:
        return self.source.prompt(int(self.rows[number]))

    def name(self, number: int) -> str:
        return self.source.name(int(self.rows[number]))

    def shard_sizes(self) -> Sequence[int]:
        ends = np.cumsum(self.source.shard_sizes())
        sizes = np.diff(np.searchsorted(self.rows, ends, side="left"), prepend=0)
        return sizes[sizes > 0].tolist()

    def count_captions(self) -> np.ndarray:
        return self.source.count_captions()[self.rows]

    def fingerprint(self) -> str:
        """A hash of the source's fingerprint and the numbers of the rows."""
        digest = hashlib.sha256(self.source.fingerprint().encode())
        digest.update(np.ascontiguousarray(self.rows, dtype=np.int64).tobytes())
        return digest.hexdigest()


def hold_back(source: Source, share: float, *seed: int) -> tuple[SelectedRows, SelectedRows]:
    """The rows to train on, and the rows that are held back: `share` of all, at least one, drawn by `seed`.

    Args:
        seed: Whole numbers, 0 or above.

    Raises:
        ValueError: If nothing would be left to train on.
    """
    number = max(1, round(share * len(source)))
    if number >= len(source):
        raise ValueError(
            f"eval_share {share:g} of a source with {len(source)} rows leaves nothing to train on; give more data, or "
            "evaluation data of its own"
        )
    order = np.random.default_rng(np.random.SeedSequence(seed)).permutation(len(source))
    held = np.zeros(len(source), dtype=bool)
    held[order[:number]] = True
    return SelectedRows(source, np.flatnonzero(~held)), SelectedRows(source, np.flatnonzero(held))
