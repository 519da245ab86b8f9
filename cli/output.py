"""Results on disk, complete at any moment; and the summary of what could not be done."""

import sys
import time
from pathlib import Path
from typing import Any

from vlv.files import write_json


class IncrementalJson:
    """A JSON object on disk that grows by entries.

    The file is written anew with each `save`, but never so often that writing takes more than a twentieth of the time;
    `close` writes what is left, also when the run is interrupted.
    """

    def __init__(self, path: Path, values: dict[str, Any] | None = None):
        self.path, self.values = path, dict(values or {})
        self._next, self._pending = 0.0, False

    def save(self, entries: dict[str, Any]) -> None:
        self.values.update(entries)
        self._pending = True
        if time.monotonic() >= self._next:
            self._write()

    def close(self) -> None:
        if self._pending:
            self._write()

    def _write(self) -> None:
        start = time.monotonic()
        write_json(self.path, self.values)
        end = time.monotonic()
        self._next, self._pending = end + 20 * (end - start), False

    def __enter__(self) -> "IncrementalJson":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._pending = self._pending or kind is None  # a run that did nothing still leaves a result, unless cut short
        self.close()


class Summary:
    """Counts what was done and names what was not."""

    def __init__(self) -> None:
        self.done = 0
        self.failed: dict[str, str] = {}

    def fail(self, name: str, reason: str) -> None:
        self.failed[name] = reason
        print(f"cannot read {name}: {reason}", file=sys.stderr)

    def close(self, verb: str, where: str) -> int:
        """Prints the summary; returns the exit code, 1 if anything failed."""
        print(f"{verb} {self.done}, failed {len(self.failed)}: {where}", file=sys.stderr)
        return 1 if self.failed else 0
