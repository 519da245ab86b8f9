"""The cache of rewards: denoising losses of images under texts, which the frozen text-to-image model gives."""

import hashlib
import json
import math
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NO_WORDS = "\0"  # stands for None, which is no words: an empty caption is another text
TABLE = (
    "CREATE TABLE IF NOT EXISTS losses (scorer BLOB, image BLOB, text TEXT, loss REAL, "
    "PRIMARY KEY (scorer, image, text)) WITHOUT ROWID"
)


class RewardCache:
    """Losses by scorer, image and text, in an SQLite file. What has been added survives a killed process.

    Args:
        path: The file, which is created. One process writes it.
        scorer: The settings and fingerprints that a loss depends on, as JSON values.

    Raises:
        OSError: If the file cannot be written, or is no SQLite file.
    """

    def __init__(self, path: str | Path, scorer: Mapping[str, Any]):
        self.path = Path(path)
        text = json.dumps(scorer, sort_keys=True, default=str)
        self._scorer = hashlib.blake2b(text.encode(), digest_size=16).digest()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._errors():
            self._connection = sqlite3.connect(self.path, timeout=60)
            self._connection.execute(TABLE)

    def read(self, image: int) -> dict[str | None, float]:
        """The losses of an image, by text.

        Args:
            image: Its fingerprint, below 2**64.
        """
        with self._errors():
            rows = self._connection.execute(
                "SELECT text, loss FROM losses WHERE scorer = ? AND image = ?", (self._scorer, _key(image))
            ).fetchall()
        return {None if text == NO_WORDS else text: loss for text, loss in rows}

    def add(self, losses: Mapping[int, Mapping[str | None, float]]) -> None:
        """Adds the losses of images. Those that are not finite are left out."""
        rows = [
            (self._scorer, _key(image), NO_WORDS if text is None else text, loss)
            for image, own in losses.items()
            for text, loss in own.items()
            if math.isfinite(loss)
        ]
        with self._errors(), self._connection:
            self._connection.executemany("INSERT OR IGNORE INTO losses VALUES (?, ?, ?, ?)", rows)

    def close(self) -> None:
        self._connection.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise OSError(f"the cache of rewards {self.path}: {error}; name another file, or remove it") from error


def _key(image: int) -> bytes:
    return image.to_bytes(8)
