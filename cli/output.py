"""Results on disk, complete at any moment; and the tally of what could not be done."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a file beside `path` and then puts it in its place, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Atomically, as UTF-8; file names that are no UTF-8 are escaped."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError:
        data = json.dumps(value, indent=2).encode("ascii")
    write_atomically(path, lambda temporary: temporary.write_bytes(data + b"\n"))


class GrowingJson:
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

    def __enter__(self) -> "GrowingJson":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._pending = self._pending or kind is None  # a run that did nothing still leaves a result, unless cut short
        self.close()


class Tally:
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


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
