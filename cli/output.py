"""Results on disk, readable at any moment; progress and the summary of a run on standard error."""

import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlv.files import write_json

MAX_WRITING_SHARE = 20  # writing takes at most 1/20 of the time


class IncrementalJson:
    """A JSON object on disk to which entries are added during a run.

    `save` rewrites the file, and limits writing to a twentieth of the run time. `close` writes the entries that are
    not on disk yet, also after an interruption. As a context manager it closes at the end.

    Args:
        path: The JSON file.
        values: Entries to start with.
    """

    def __init__(self, path: Path, values: dict[str, Any] | None = None):
        self.path, self.values = path, dict(values or {})
        self._next_write, self._unwritten = 0.0, False

    def save(self, entries: dict[str, Any]) -> None:
        """Adds entries. Writes the file if the interval since the last write has passed."""
        self.values.update(entries)
        self._unwritten = True
        if time.monotonic() >= self._next_write:
            self._write()

    def close(self) -> None:
        """Writes the entries that are not on disk yet."""
        if self._unwritten:
            self._write()

    def _write(self) -> None:
        start = time.monotonic()
        write_json(self.path, self.values)
        end = time.monotonic()
        self._next_write, self._unwritten = end + MAX_WRITING_SHARE * (end - start), False

    def __enter__(self) -> "IncrementalJson":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._unwritten = self._unwritten or kind is None  # a run without results writes an empty file at its end
        self.close()


class Summary:
    """Counts the inputs that are done, names those that failed, and shows one progress bar on a terminal.

    Args:
        total: Number of inputs.
    """

    def __init__(self, total: int):
        self.done = 0
        self.failed: dict[str, str] = {}
        self._bar = tqdm(
            total=total,
            disable=None,  # without a terminal
            unit=" images",
            bar_format="{percentage:3.0f}%|{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_fmt}]",
        )

    def advance(self, images: float) -> None:
        """Moves the progress bar by a number of images, which may be a fraction."""
        self._bar.update(images)

    def fail(self, name: str, reason: str) -> None:
        """Records and prints that an input could not be read."""
        self.failed[name] = reason
        self._bar.write(f"cannot read {name}: {reason}", file=sys.stderr)
        self._bar.update()

    def close(self, verb: str, output: str) -> int:
        """Prints the summary; returns the exit code, 1 if an input failed."""
        self._bar.close()
        print(f"{verb} {self.done}, failed {len(self.failed)}: {output}", file=sys.stderr)
        return 1 if self.failed else 0
