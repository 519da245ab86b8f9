"""Results on disk, readable at any moment; progress and the summary of a run on standard error."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from vlv.errors import UserError
from vlv.files import errors_naming, nearest_existing, to_json, write_atomically


def output_path(text: str, suffix: str, option: str = "--output") -> Path:
    """The path of an output file that can be written.

    Args:
        suffix: What its name must end in, such as `.json`.
        option: The option that gave the path, for the message.

    Raises:
        UserError: If the path has another suffix, is a folder, or cannot be written.
    """
    path = Path(text)
    if path.suffix.lower() != suffix:
        raise UserError(f"{option} {text} must end in {suffix}")
    if path.is_dir():
        raise UserError(f"{option} {text} is a folder; give the name of a file")
    require_writable(path.parent, option, text)
    return path


def require_writable(folder: Path, option: str, text: str) -> None:
    """Raises `UserError` if no file can be written into a folder, which may have to be created."""
    existing = nearest_existing(folder)
    if not existing.is_dir():
        raise UserError(f"{option} {text} cannot be written: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise UserError(f"{option} {text} cannot be written: no permission to write into {existing}")


def refuse_existing(path: Path, option: str, *, resumable: bool = False) -> None:
    """Raises `UserError` if an output exists, for commands without `--overwrite` (and `--resume`, if they have it)."""
    if os.path.lexists(path):
        go_on = "pass --resume to go on with it, " if resumable else "pass "
        raise UserError(f"{path} exists; {go_on}--overwrite to replace it, or another {option}")


class GrowingFile:
    """A file to which entries are added during a run. An addition costs the same whatever the length of the file.

    The file is created, or replaced, by the first addition or `close`. What stands behind the entries, the closing, is
    written again with each addition.

    Args:
        path: The file.
        entries: Entries to start with.
    """

    def __init__(self, path: Path, entries: Mapping[str, Any] | None = None):
        self.path = path
        self._entries, self._count = dict(entries or {}), 0
        self._opening = self._closing = b""
        self._file: Any = None
        self._end = 0  # where the closing begins, in bytes

    def add(self, entries: Mapping[str, Any]) -> None:
        """Adds entries, which are complete on disk when it returns.

        Raises:
            OSError: If they cannot be written; the file is then as before.
        """
        with errors_naming(self.path):
            self._open()
            data = self._lines(entries)
            try:
                self._write(data + self._closing)
            except OSError:
                self._write(self._closing)
                self._file.truncate(self._end + len(self._closing))
                raise
            self._end += len(data)
            self._count += len(entries)

    def close(self, tail: Mapping[str, Any] | None = None) -> None:
        """Ends the run: a run without results leaves a file without entries.

        Args:
            tail: Values that follow the entries, where the format has such.
        """
        with errors_naming(self.path):
            self._open()
            if tail:
                self._write(self._closing_with(tail))
            self._file.close()

    def _lines(self, entries: Mapping[str, Any]) -> bytes:
        """The bytes of entries that follow `_count` others."""
        raise NotImplementedError

    def _closing_with(self, tail: Mapping[str, Any]) -> bytes:
        raise NotImplementedError

    def _open(self) -> None:
        if self._file is None:
            data = self._opening + self._lines(self._entries)
            write_atomically(self.path, lambda temporary: temporary.write_bytes(data + self._closing))
            self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115 (open for the whole run)
            self._end, self._count = len(data), len(self._entries)
            self._entries = {}

    def _write(self, data: bytes) -> None:
        self._file.seek(self._end)
        while data:
            data = data[self._file.write(data) :]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None and (self._file is None or not self._file.closed):
            self.close()
        elif self._file is not None:
            self._file.close()


class GrowingJson(GrowingFile):
    """A JSON object on disk to which entries are added during a run.

    An addition replaces the closing brackets by the entry and the brackets. The file is complete JSON after each
    addition, with one entry on a line, so that `read_results` recovers the others if a machine fails during a write.

    Args:
        path: The JSON file.
        entries: Entries to start with.
        head: Values that precede the entries; the entries are then an object of their own, called `key`.
    """

    def __init__(
        self,
        path: Path,
        entries: Mapping[str, Any] | None = None,
        head: Mapping[str, Any] | None = None,
        key: str = "images",
    ):
        super().__init__(path, entries)
        self._opening, self._indent, self._closing = b"{", b"\n  ", b"\n}\n"
        if head is not None:
            lines = [b"\n  " + to_json(name, None) + b": " + to_json(value, None) for name, value in head.items()]
            lines.append(b"\n  " + to_json(key, None) + b": {")
            self._opening, self._indent, self._closing = b"{" + b",".join(lines), b"\n    ", b"\n  }\n}\n"

    def _lines(self, entries: Mapping[str, Any]) -> bytes:
        lines = [self._indent + to_json(name, None) + b": " + to_json(value, None) for name, value in entries.items()]
        separator = b"," if self._count and lines else b""
        return separator + b",".join(lines)

    def _closing_with(self, tail: Mapping[str, Any]) -> bytes:
        """The closing brackets with values between them, where `head` precedes the entries."""
        lines = [b",\n  " + to_json(name, None) + b": " + to_json(value, None) for name, value in tail.items()]
        return self._closing.removesuffix(b"\n}\n") + b"".join(lines) + b"\n}\n"


WITH_TOTAL = "{percentage:3.0f}%|{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_fmt}]"
WITHOUT_TOTAL = "{n:.0f} images [{elapsed}, {rate_fmt}]"


class Summary:
    """Counts the inputs that are done, names those that failed, and shows one progress bar on a terminal.

    Args:
        total: Number of inputs; None if it is not known yet: then the bar has no end.
        names_failures: Whether `failed` has the name and reason of each failure; `num_failed` counts them anyway.
    """

    def __init__(self, total: int | None, names_failures: bool = True):
        self.done = self.num_failed = 0
        self._names_failures = names_failures
        self.failed: dict[str, str] = {}
        self._bar = tqdm(
            total=total,
            disable=None,  # without a terminal
            unit=" images",
            bar_format=WITHOUT_TOTAL if total is None else WITH_TOTAL,
        )

    @property
    def shows_progress(self) -> bool:
        """Whether there is a terminal with a progress bar."""
        return not self._bar.disable

    def set_total(self, total: int | None) -> None:
        """Gives the progress bar its end, as soon as the number of inputs is known."""
        if total is not None:
            self._bar.total, self._bar.bar_format = total, WITH_TOTAL

    def advance(self, images: float) -> None:
        """Moves the progress bar by a number of images, which may be a fraction."""
        self._bar.update(images)

    def fail(self, name: str, reason: str, verb: str = "read") -> None:
        """Records and prints that an input could not be read, or its result not be written."""
        self.num_failed += 1
        if self._names_failures:
            self.failed[name] = reason
        self._bar.write(f"cannot {verb} {name}: {reason}", file=sys.stderr)
        if verb == "read":
            self._bar.update()

    def say(self, *notes: str) -> None:
        """Prints notes."""
        for note in notes:
            self._bar.write(note, file=sys.stderr)

    def end(self) -> None:
        """Removes the progress bar's claim to the terminal, without a summary."""
        self._bar.close()

    def close(self, verb: str, output: str, kept: int | None = None, skipped: int | None = None) -> int:
        """Prints the summary; returns the exit code, 1 if an input failed.

        Args:
            kept: Number of results of an earlier run, if this one goes on with it.
            skipped: Number of inputs that had a result, if they can be skipped.
        """
        self._bar.close()
        before = "".join(
            f"{what} {count}, " for what, count in (("kept", kept), ("skipped", skipped)) if count is not None
        )
        print(f"{before}{verb} {self.done}, failed {self.num_failed}: {output}", file=sys.stderr)
        return 1 if self.num_failed else 0
