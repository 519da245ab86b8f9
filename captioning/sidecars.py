"""Captions in files beside the images: names, what happens to files that are there, reading and writing."""

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from copy import copy
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any

from vlv.errors import UserError
from vlv.files import to_json, write_atomically
from vlv.image_files import image_suffixes

from .inputs import Input
from .output import Summary, require_writable

ENDING_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Errors of writing that the next file would have, too."""
TAG_SUFFIXES, CAPTION_SUFFIXES = (".tags", ".txt", ".json"), (".caption", ".txt", ".json")

OF_A_CAPTION = ("score", "confident")
"""What a JSON sidecar has of its caption alone."""


class ExistingCaption(UserError):
    """A caption is there already, and `--on-existing` is `error`."""


class SharedSidecar(UserError):
    """The sidecar of an image is that of an image before it."""


class UnsupportedFile(UserError):
    """An image file of a format that captions cannot be written into."""


class CaptionFiles:
    """Puts captions where they belong to each image, and leaves images alone that have one.

    Args:
        on_existing: One of `choices.ON_EXISTING`.
        separator: Stands between an existing caption and the one that is appended or prepended.
    """

    def __init__(self, on_existing: str = "error", separator: str = ", "):
        self.on_existing, self.separator = on_existing, separator
        self.skipped = 0

    def select(self, inputs: Iterable[Input], summary: Summary) -> Iterator[Input]:
        """The inputs that are to be captioned; those with a caption are skipped, or named as failed, and not read."""
        for item in inputs:
            try:
                wanted = item.problem is not None or self.wants(item)
                self.skipped += not wanted
            except UserError as error:
                summary.fail(item.name, str(error), "caption")
                wanted = False
            if wanted:
                yield item
            else:
                summary.advance(1)

    def wants(self, item: Input) -> bool:
        """Whether an input is to be captioned. Each input may be asked about once.

        Raises:
            UserError: If its caption cannot be put there.
            ExistingCaption: If it has a caption, and `on_existing` is `error`.
        """
        raise NotImplementedError

    def claim(self, item: Input) -> None:
        """Keeps the place of an input's caption from other inputs. Raises `UserError` if another input has it."""

    def copy(self) -> "CaptionFiles":
        """The same settings and claims, which both change by themselves."""
        return copy(self)

    def holds(self, item: Input, entry: Any) -> bool:
        """Whether the caption of an input is where it belongs. Raises `OSError` or `ValueError`."""
        raise NotImplementedError

    def write(self, item: Input, entry: Any) -> Input:
        """Writes the caption of an input, and returns the input, whose `identity` changes if the image file does.

        Args:
            entry: A caption, a list of captions, or an object with `caption`.

        Raises:
            OSError: If it cannot be written.
            ValueError: If a caption that exists cannot be read.
        """
        raise NotImplementedError

    def place(self, item: Input) -> str:
        """Where the caption of an input is put, for messages. Raises `UserError` if it cannot be put there."""
        raise NotImplementedError

    def merged(self, existing: str, caption: str) -> str:
        """A caption with the one that exists. One that is there already is not added again.

        Texts that are joined are without surrounding white space.
        """
        if self.on_existing not in ("append", "prepend"):
            return caption
        existing, caption = existing.strip(), caption.strip()
        if not existing or not caption:
            return existing or caption
        if self.on_existing == "append":
            done = existing == caption or existing.endswith(self.separator + caption)
            return existing if done else existing + self.separator + caption
        done = existing == caption or existing.startswith(caption + self.separator)
        return existing if done else caption + self.separator + existing


class Sidecars(CaptionFiles):
    """Writes the captions of an image into files beside it, each complete or absent.

    Keeps a hash of each image's sidecar, about 100 bytes.

    Args:
        kind: The suffix, one of `choices.KINDS`. `txt` and `caption` hold the caption alone, `json` an object.
        folder: Where the files are written, with the names of the images; None for beside the images.
        full_names: Whether the caption of `a.png` is in `a.png.txt`, and not in `a.txt`.
        count: Captions of an image. Several are in `a.1.txt`, `a.2.txt`, ...; in JSON they are a list.
    """

    def __init__(
        self,
        kind: str,
        folder: Path | None = None,
        full_names: bool = False,
        count: int = 1,
        on_existing: str = "error",
        separator: str = ", ",
    ):
        super().__init__(on_existing, separator)
        self.kind, self.folder, self.full_names, self.count = kind, folder, full_names, count
        self._taken: set[bytes] = set()
        self._writable: Path | None = None
        """The folder that was found writable last."""

    def paths(self, item: Input) -> list[Path]:
        """The sidecars of an input.

        Raises:
            UserError: If the input is not a file of its own, and there is no `folder`.
        """
        if self.folder is not None:
            parts = ["_" if part == ".." else part for part in PurePosixPath(item.name).parts if part != "/"]
            image = self.folder.joinpath(*parts)
        elif item.is_file:
            image = item.path
        else:
            raise UserError(f"{item.name} is not a file that a sidecar can lie beside; pass --sidecar-dir DIR")
        stem = image.name if self.full_names else image.stem
        numbers = [""] if self.count == 1 or self.kind == "json" else [f".{n + 1}" for n in range(self.count)]
        return [image.with_name(f"{stem}{number}.{self.kind}") for number in numbers]

    def place(self, item: Input) -> str:
        paths = self.paths(item)
        return str(paths[0]) if len(paths) == 1 else f"{paths[0]} ... {paths[-1].name}"

    def claim(self, item: Input) -> None:
        paths = self.paths(item)
        key = hashlib.blake2b(os.fsencode(os.path.abspath(paths[0])), digest_size=16).digest()
        if key in self._taken:
            raise SharedSidecar(
                f"{item.name} and {self._namesake(item)} would share {paths[0]}; pass --sidecar-name full, which "
                f"writes {PurePosixPath(item.name).name}.{self.kind}"
            )
        self._taken.add(key)

    def wants(self, item: Input) -> bool:
        self.claim(item)
        paths = self.paths(item)
        if paths[0].parent != self._writable:
            require_writable(paths[0].parent, "--sidecar", self.kind)
            self._writable = paths[0].parent
        existing = [path for path in paths if os.path.lexists(path)]
        if existing and self.on_existing == "error":
            raise ExistingCaption(f"{existing[0]} exists; {advice()}")
        return not (self.on_existing == "skip" and len(existing) == len(paths))

    def copy(self) -> "Sidecars":
        other = copy(self)
        other._taken = set(self._taken)
        return other

    def holds(self, item: Input, entry: Any) -> bool:
        """Whether the sidecars are those of an entry, and not older than the image."""
        changed = 0 if item.remote is not None else item.path.stat().st_mtime_ns
        files = self._files(item, entry)
        return all(path.read_bytes() == data and path.stat().st_mtime_ns >= changed for path, data in files)

    def write(self, item: Input, entry: Any) -> Input:
        for path, data in self._files(item, entry):
            self._write(path, data)
        return item

    def _files(self, item: Input, entry: Any) -> Iterator[tuple[Path, bytes]]:
        """The sidecars of an input and what they hold with an entry. Raises `OSError` or `ValueError`."""
        paths = self.paths(item)
        if self.kind == "json":
            yield paths[0], self._merged_json(paths[0], entry if isinstance(entry, dict) else {"caption": entry})
            return
        text = entry["caption"] if isinstance(entry, dict) else entry
        for path, caption in zip(paths, text if isinstance(text, list) else [text], strict=True):
            existing = _read_text(path) if self.on_existing in ("append", "prepend") else ""
            yield path, (self.merged(existing, caption) + "\n").encode()

    def _write(self, path: Path, data: bytes) -> None:
        """Writes a sidecar. One that has appeared since `wants` is kept, or is an error, as `on_existing` says."""
        replaces = self.on_existing not in ("error", "skip")
        with suppress(FileExistsError) if self.on_existing == "skip" else nullcontext():
            write_atomically(path, lambda temporary: temporary.write_bytes(data), replaces)

    def _merged_json(self, path: Path, values: dict[str, Any]) -> bytes:
        """The object of a file with the new values; others that it has stay, but not those of another caption."""
        existing: Any = {}
        if path.exists():
            try:
                existing = json.loads(path.read_text(encoding="utf-8-sig"))
                if not isinstance(existing, dict):
                    raise ValueError("it is not an object")
            except ValueError as error:
                if self.on_existing != "overwrite":
                    raise ValueError(f"{path} cannot be read as JSON: {error}") from error
                existing = {}
        before, caption = existing.get("caption"), values["caption"]
        if isinstance(caption, str) and isinstance(before, str):
            caption = self.merged(before, caption)
        elif self.on_existing in ("append", "prepend") and before:
            lists = [part if isinstance(part, list) else [part] for part in (before, caption)]
            new = [text for text in lists[1] if text and text not in lists[0]]
            caption = lists[0] + new if self.on_existing == "append" else new + lists[0]
        kept = {name: value for name, value in existing.items() if name not in OF_A_CAPTION}
        return to_json(kept | values | {"caption": caption}) + b"\n"

    def _namesake(self, item: Input) -> str:
        """The other image that has the sidecar of an input."""
        if item.is_file and self.folder is None:
            for other in sorted(item.path.parent.glob(f"{escape(item.path.stem)}.*")):
                if other != item.path and other.suffix.lower() in image_suffixes():
                    return other.name
        return "another image"


def advice() -> str:
    """What to do about a caption that exists."""
    return "pass --on-existing skip, overwrite, append or prepend"


def ends_the_run(error: Exception) -> bool:
    """Whether an error of writing is not one of a single file, such as that of a full disk."""
    return isinstance(error, OSError) and error.errno in ENDING_ERRORS


def read_sidecar(item: Input, what: str) -> str:
    """The caption or the tags that lie beside an image; "" if there are none.

    Args:
        what: `"caption"` (`.caption`, `.txt`, or `caption` in `.json`) or `"tags"` (`.tags`, `.txt`, or `tags`). The
            first of these files counts, by the image's full name or its stem.
    """
    if not item.is_file:
        return ""
    for suffix in TAG_SUFFIXES if what == "tags" else CAPTION_SUFFIXES:
        for stem in (item.path.name, item.path.stem):
            path = item.path.with_name(stem + suffix)
            if not path.is_file():
                continue
            text = _read_text(path)
            return _value_in_json(text, what) if suffix == ".json" else text
    return ""


def _value_in_json(text: str, what: str) -> str:
    try:
        values = json.loads(text)
    except ValueError:
        return ""
    value = values.get(what) if isinstance(values, dict) else None
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return value if isinstance(value, str) else ""


def _read_text(path: Path) -> str:
    """The text of a file without surrounding white space; "" if there is no file.

    Raises:
        OSError, ValueError: If it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
