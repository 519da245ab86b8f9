"""Images of a source as records: a name that does not depend on the place of the source, the file, the caption."""

import hashlib
import io
import json
import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlv.image_files import is_url
from vlv.processing_vlv import to_rgb
from vlv.train.data.captions import CAPTION_COLUMN, FIRST, IMAGE_COLUMN, PROMPT_COLUMN, alternatives
from vlv.train.data.lists import PROBLEM, ListDataset
from vlv.train.data.loading import open_source
from vlv.train.data.source import Source, UnreadableImage

from .run import describe_files


@dataclass(frozen=True)
class Record:
    """An image file, with what its source says of it.

    Attributes:
        name: Unique in the source.
        image: A path, or the bytes of a file, or what else a source holds; see `file_of`.
        captions: The captions with words; empty if there is none, None for a source of images alone.
        prompt: The instruction, "" for none.
    """

    name: str
    image: Any
    captions: list[str] | None = None
    prompt: str = ""


class Records:
    """The records of a source, by number.

    Args:
        source: A folder, a list, the JSON of captions, parquet or tar files, or a data set, as for training.
        pairs: Whether the captions are read, too.
        image_root: The folder that paths in lists and tables start from; by default that of the list.
        captions: A file of `vlv data recaption` or `vlv caption` of the same source: its captions are read in place of
            the source's own, and the images alone that it has.

    Raises:
        ImportError: If the source needs `datasets`, and it is not installed.
        ValueError: If nothing is found, no image has a caption and `pairs` asks for them, or `captions` names an image
            that the source does not have.
    """

    def __init__(
        self,
        source: str,
        *,
        pairs: bool = False,
        image_root: str | None = None,
        image_column: str = IMAGE_COLUMN,
        caption_column: str = CAPTION_COLUMN,
        captions: str | None = None,
    ):
        if pairs and captions is not None:
            raise ValueError("pairs are read with the captions of the source or with those of a list, not with both")
        caption, prompt = (caption_column, PROMPT_COLUMN) if pairs else (None, None)
        self.pairs, self.description, self.captions = pairs or captions is not None, source, captions
        columns = (image_column, caption, image_root, FIRST, prompt)
        self.source: Source = open_source(source, "train", *columns, keeps_unreadable=True)
        self._root = self._common_folder()
        self._hint = "; name the folder that paths start from by --image-root" if image_root is None else ""
        self._rows: Sequence[int] = range(len(self.source))
        self._texts: list[list[str]] = []  # of the rows, from the list of captions
        if captions is not None:
            self._rows, self._texts = self._read_captions(captions)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def has_prompts(self) -> bool:
        """Whether there are instructions."""
        return self.captions is None and self.source.has_prompts

    @property
    def in_files(self) -> bool:
        """Whether each image is a file of its own, or would be: URLs in a list, and files that do not exist."""
        return isinstance(self.source, ListDataset)

    def has_several_captions(self) -> bool:
        """Whether an image has more than one caption."""
        if self.captions is not None:
            return any(len(texts) > 1 for texts in self._texts)
        return self.pairs and bool((self.source.count_captions() > 1).any())

    def name(self, number: int) -> str:
        """The path of an image from the folder of the source, or its URL; of an image in a shard, shard and place."""
        name = self.source.name(self._rows[number])
        return name if self._root is None or is_url(name) else os.path.relpath(name, self._root)

    def path(self, number: int) -> str | None:
        """The absolute path of an image that is a file of its own."""
        if not self.in_files or is_url(image := self.source[self._rows[number]]["image"]):
            return None
        return os.path.abspath(image)

    def read(self, number: int) -> Record:
        """A record.

        Raises:
            OSError, ValueError: If it cannot be read from the source.
        """
        item = self.source[self._rows[number]]
        problem = item.get(PROBLEM)
        if problem is None and self.in_files and not os.path.isfile(item["image"]):
            problem = f"the file does not exist{self._hint}"
            if is_url(item["image"]):
                problem = "it is a URL; `vlv data download` comes first"
        if problem is not None:
            item["image"] = UnreadableImage(self.name(number), problem)
        if self.captions is not None:
            return Record(self.name(number), item["image"], self._texts[number])
        captions = (alternatives(item.get("caption")) or []) if self.pairs else None
        prompt = item.get("prompt") or ""
        return Record(self.name(number), item["image"], captions, prompt if isinstance(prompt, str) else "")

    def read_or_reason(self, number: int) -> Record:
        """A record; of one that cannot be read from the source, the image is an `UnreadableImage`."""
        try:
            return self.read(number)
        except (OSError, ValueError) as error:
            name = self.name(number)
            return Record(name, UnreadableImage(name, reason_of(error)), [] if self.pairs else None)

    def identity(self) -> dict[str, Any]:
        """What identifies the source: its place, number of records, and hashes of names, sizes, captions and times."""
        place = os.path.abspath(self.description) if os.path.exists(self.description) else self.description
        known: dict[str, Any] = {"source": place, "records": len(self), "pairs": self.pairs}
        if self.captions is not None:
            known["captions"] = describe_files([self.captions])
        return known | {"fingerprint": self.source.fingerprint(), "times": self._times()}

    def place_in(self, output: Path) -> Path | None:
        """The folder of the source, if an output is that folder or lies in it."""
        folder = Path(self.description)
        return folder if folder.is_dir() and output.resolve().is_relative_to(folder.resolve()) else None

    def _times(self) -> str:
        """A hash of the times of the files that hold the images."""
        files: Iterable[str] = getattr(self.source, "files", ())
        if isinstance(self.source, ListDataset):
            files = (item["image"] for item in self.source)
        digest = hashlib.blake2b(digest_size=16)
        for file in files:
            changed = os.stat(file).st_mtime_ns if os.path.exists(file) else 0
            digest.update(changed.to_bytes(8, "big", signed=True))
        return digest.hexdigest()

    def _read_captions(self, file: str) -> tuple[Sequence[int], list[list[str]]]:
        """The rows of the images that a list names, and their captions."""
        texts, of_paths = _captions_by_name(file)
        folder = os.path.dirname(os.path.abspath(file))
        rows, found = array("q"), list[list[str]]()
        for number in self._rows:
            path = self.path(number) if of_paths else None
            text = texts.pop(self.name(number) if path is None else os.path.relpath(path, folder), None)
            if text is not None:
                rows.append(number)
                found.append(text)
        if texts:
            raise ValueError(
                f"{file} names {next(iter(texts))!r}, which is not in {self.description}; give the source that was "
                "captioned"
            )
        return rows, found

    def _common_folder(self) -> str | None:
        if isinstance(self.source, ListDataset):
            return os.path.abspath(self.source.root)
        files: Sequence[str] | None = getattr(self.source, "files", None)
        return None if files is None else os.path.commonpath([os.path.dirname(os.path.abspath(f)) for f in files])


def _captions_by_name(file: str) -> tuple[dict[str, list[str]], bool]:
    """The captions of `vlv data recaption` or `vlv caption`, and whether they are called by paths from the file.

    Those are lines `{"file_name": ..., "caption": ...}`, by paths from the folder of the file, or lines
    `{"name": ..., "caption": ...}` and `{name: caption}`, by names in the source.

    Raises:
        ValueError: If it cannot be read; the message names the line.
    """
    found: dict[str, list[str]] = {}
    of_paths = True
    try:
        with open(file, encoding="utf-8") as lines:
            if file.lower().endswith(".json"):
                values = json.load(lines)
                if not isinstance(values, dict):
                    raise ValueError("expected {name: caption}")
                entries: Iterable[Any] = (
                    (value if isinstance(value, dict) else {"caption": value}) | {"name": name}
                    for name, value in values.items()
                )
            else:
                entries = map(json.loads, lines)
            for number, entry in enumerate(entries, 1):
                of_paths = isinstance(entry, dict) and "file_name" in entry
                name = entry.get("file_name", entry.get("name")) if isinstance(entry, dict) else None
                texts = alternatives(entry.get("caption")) if isinstance(name, str) else None
                if texts is None:
                    raise ValueError(f'entry {number} is not {{"file_name": ..., "caption": ...}}')
                if texts:
                    found[str(name)] = texts
    except (OSError, ValueError) as error:
        made_by = "`vlv data recaption` or `vlv caption`"
        raise ValueError(f"{file} cannot be read as captions of {made_by}: {error}") from error
    return found, of_paths


def file_of(image: Any) -> bytes:
    """The bytes of an image file. Arrays become PNG.

    Raises:
        OSError, ValueError: If it cannot be read; the message does not repeat a path.
    """
    if isinstance(image, UnreadableImage):
        raise ValueError(image.reason)
    if isinstance(image, bytes):
        return bytes(image)
    if isinstance(image, str) and not image.startswith("data:") and os.path.exists(image):
        with open(image, "rb") as file:
            return file.read()
    content = io.BytesIO()
    to_rgb(image).save(content, "PNG")
    return content.getvalue()


def reason_of(error: Exception) -> str:
    """Why a record cannot be read, in one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200] or type(error).__name__


def list_entry(records: Records, record: Record, number: int, folder: str | os.PathLike) -> dict[str, Any]:
    """The line of a record in a list that the trainers read: the path from the folder of the list, the captions.

    An image that is not a file of its own has its name in place of the path.
    """
    path = records.path(number)
    entry: dict[str, Any] = {
        "file_name": record.name if path is None else os.path.relpath(path, os.path.abspath(folder))
    }
    if record.captions is not None:
        entry["caption"] = record.captions[0] if len(record.captions) == 1 else record.captions
    return entry | ({"prompt": record.prompt} if record.prompt else {})
