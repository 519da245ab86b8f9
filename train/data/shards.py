"""WebDataset shards: tar files whose members are read by their offsets, without unpacking and without reading on."""

import hashlib
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
from transformers.utils import logging

from vlv.image_files import image_suffixes

from .captions import (
    CAPTION_COLUMN,
    CAPTION_COLUMNS,
    PROMPT_COLUMN,
    UNKNOWN,
    WHOLE,
    count_alternatives,
    find_column,
    missing_prompt_column,
    say_prompt_column,
    sidecar_captions,
)
from .source import EncodedImage, Source, hash_files
from .stored import count_by_file, stored_arrays

logger = logging.get_logger(__name__)

CAPTION_SUFFIXES = (".txt", ".caption", ".json")
"""Of a sample's captions the first of these counts."""
MAX_OPEN_FILES = 32
SEARCHED_FOR_PROMPTS = 100
"""In so many `.json` files a column of instructions is looked for."""


class TarSource(Source):
    """Tar files of images and captions, grouped by the name before the first dot as WebDataset does.

    A sample has an image (`.jpg`, `.png`, `.webp` or another suffix that Pillow reads), and for captions a `.txt`, a
    `.caption`, or a `.json` with a caption column. Instructions stand in a column of the `.json`. An index of offsets
    is made of each file once.

    Raises:
        ValueError: If a file cannot be read, or no sample has an image.
    """

    def __init__(
        self,
        files: Sequence[str | os.PathLike],
        caption_column: str | None,
        caption_lines: str = "first",
        prompt_column: str | None = None,
    ):
        self.files = [str(file) for file in files]
        self.has_captions, self.caption_column, self.caption_lines = (
            caption_column is not None,
            caption_column,
            caption_lines,
        )
        indexes = stored_arrays(self.files, "members and JSON", lambda number: _index(self.files[number]))
        sizes = [len(index["members"]) for index in indexes]
        self._sizes, self._ends = np.array(sizes, dtype=np.int64), np.cumsum(sizes)
        if not sum(sizes):
            raise ValueError(f"no images in {', '.join(self.files[:3])}; expected members such as 0001.jpg, 0001.txt")
        self._members = np.concatenate([index["members"] for index in indexes])
        self._json = np.concatenate([index["json"] for index in indexes])  # (rows, 2): offset and size, or 0
        self._names = [index["names"].tobytes() for index in indexes]
        self._recent: tuple[int, list[bytes]] = (-1, [])
        self._handles: OrderedDict[int, Any] = OrderedDict()
        self._process = os.getpid()
        self.prompt_column = None
        if self.caption_column is not None:
            self._say_column()
            self.prompt_column = self._find_prompts(prompt_column)
        self.has_prompts = self.prompt_column is not None

    def __len__(self) -> int:
        return len(self._members)

    def __getstate__(self):
        return self.__dict__ | {"_handles": OrderedDict()}

    def shard_sizes(self) -> Sequence[int]:
        return self._sizes.tolist()

    def _shard(self, number: int) -> int:
        return int(np.searchsorted(self._ends, number, side="right"))

    def name(self, number: int) -> str:
        shard = self._shard(number)
        row = number - int(self._ends[shard] - self._sizes[shard])
        return f"{self.files[shard]}:{os.fsdecode(self._split_names(shard)[row])}"

    def _split_names(self, shard: int) -> list[bytes]:
        if self._recent[0] != shard:
            self._recent = (shard, self._names[shard].split(b"\0"))
        return self._recent[1]

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        if os.getpid() != self._process:  # after a fork: the other process may close its files
            self._handles, self._process = OrderedDict(), os.getpid()
        if shard not in self._handles:
            self._handles[shard] = open(self.files[shard], "rb", buffering=0)  # noqa: SIM115 (kept open)
            if len(self._handles) > MAX_OPEN_FILES:
                self._handles.popitem(last=False)[1].close()
        self._handles.move_to_end(shard)
        return os.pread(self._handles[shard].fileno(), size, offset)

    def __getitem__(self, number: int) -> dict[str, Any]:
        shard, row = self._shard(number), self._members[number]
        image = self._bytes(shard, int(row["image_offset"]), int(row["image_size"]))
        item: dict[str, Any] = {"image": EncodedImage.named(image, self.name(number))}
        if self.has_captions:
            item["caption"] = self.caption(number)
        if self.has_prompts:
            item["prompt"] = self.prompt(number)
        return item

    def caption(self, number: int) -> Any:
        """Text, a list of texts, or None for a sample without a caption that can be read."""
        row = self._members[number]
        if row["caption_kind"] < 0:
            return None
        data = self._bytes(self._shard(number), int(row["caption_offset"]), int(row["caption_size"]))
        try:
            text = data.decode("utf-8-sig")
            if CAPTION_SUFFIXES[row["caption_kind"]] != ".json":
                captions = sidecar_captions(text, self.caption_lines)
                return captions if len(captions) > 1 else "".join(captions)
            values = json.loads(text)
        except ValueError:  # not UTF-8, or not JSON
            return None
        if not isinstance(values, dict):
            return None
        columns = CAPTION_COLUMNS if self.caption_column == CAPTION_COLUMN else (self.caption_column,)
        return next((values[column] for column in columns if column in values), None)

    def prompt(self, number: int) -> Any:
        """The value of the column of instructions in the `.json` of a sample; None if it has none."""
        return self._json_values(number).get(self.prompt_column or PROMPT_COLUMN)

    def _json_values(self, number: int) -> dict[str, Any]:
        """The `.json` of a sample; empty if there is none, or it is not a JSON object."""
        offset, size = (int(value) for value in self._json[number])
        try:
            values = json.loads(self._bytes(self._shard(number), offset, size)) if size else None
        except ValueError:
            values = None
        return values if isinstance(values, dict) else {}

    def _find_prompts(self, wanted: str | None) -> str | None:
        """The column of instructions, if one of the first `.json` files has it.

        Raises:
            ValueError: If another than the default is wanted, and none has it.
        """
        if not wanted or wanted == self.caption_column:
            return None
        for number in np.flatnonzero(self._json[:, 1])[:SEARCHED_FOR_PROMPTS]:
            if wanted in self._json_values(int(number)):
                say_prompt_column(wanted, self.files[0])
                return wanted
        if wanted != PROMPT_COLUMN:
            raise missing_prompt_column(wanted, f"{self.files[0]} (the .json files in it)")
        return None

    def _say_column(self) -> None:
        """Says which column of the first `.json` has the captions, if it is not the one that is asked for."""
        of_json = np.flatnonzero(self._members["caption_kind"] == CAPTION_SUFFIXES.index(".json"))
        if not len(of_json):
            return
        row, shard = self._members[of_json[0]], self._shard(int(of_json[0]))
        try:
            values = json.loads(self._bytes(shard, int(row["caption_offset"]), int(row["caption_size"])))
            find_column(list(values), self.caption_column or CAPTION_COLUMN, CAPTION_COLUMNS, self.files[shard])
        except (OSError, TypeError, ValueError):  # the count of captions names what has none
            pass

    def count_captions(self) -> np.ndarray:
        what = f"captions {self.caption_column} {self.caption_lines == WHOLE}"
        return count_by_file(self.files, what, self._count)

    def _count(self, file: int) -> list[int]:
        end = int(self._ends[file])
        return [self._count_row(number) for number in range(end - int(self._sizes[file]), end)]

    def _count_row(self, number: int) -> int:
        try:
            return count_alternatives(self.caption(number))
        except OSError as error:
            logger.warning(f"{self.name(number)} cannot be read: {error}")
            return UNKNOWN

    def fingerprint(self) -> str:
        """A hash of the files' names and sizes, and of the names, sizes and places of their members."""
        starts = self._ends - self._sizes
        details = [
            hashlib.sha256(names + self._members[start : start + size].tobytes()).hexdigest()
            for names, start, size in zip(self._names, starts, self._sizes, strict=True)
        ]
        return hash_files(self.files, details)


MEMBER = np.dtype(
    [
        ("image_offset", np.int64),
        ("image_size", np.int64),
        ("caption_offset", np.int64),
        ("caption_size", np.int64),
        ("caption_kind", np.int8),  # of CAPTION_SUFFIXES, or -1
    ]
)


def _index(file: str | os.PathLike) -> dict[str, np.ndarray]:
    """The members of a tar file: one row for each sample with an image, and the images' names, each ended by 0."""
    samples: dict[tuple[int, str], dict[str, tuple[int, int, str]]] = {}
    for archive, member in read_members(file):
        if not member.isfile():
            continue
        folder, _, base = member.name.rpartition("/")
        if base.startswith("."):
            continue
        stem, dot, suffix = base.partition(".")
        kind = dot + suffix.lower()
        slot = "image" if kind in image_suffixes() else kind if kind in CAPTION_SUFFIXES else None
        if slot is not None:
            sample = samples.setdefault((archive, f"{folder}/{stem}"), {})
            sample.setdefault(slot, (member.offset_data, member.size, member.name))
    rows, names, json_places = [], [], []
    for parts in samples.values():
        if "image" not in parts:
            continue
        which = next((k for k, suffix in enumerate(CAPTION_SUFFIXES) if suffix in parts), -1)
        caption = parts[CAPTION_SUFFIXES[which]] if which >= 0 else (0, 0, "")
        rows.append((*parts["image"][:2], *caption[:2], which))
        json_places.append(parts[".json"][:2] if ".json" in parts else (0, 0))
        names.append(os.fsencode(parts["image"][2]))
    return {
        "members": np.array(rows, dtype=MEMBER),
        "json": np.array(json_places, dtype=np.int64).reshape(-1, 2),
        "names": np.frombuffer(b"\0".join(names), dtype=np.uint8),
    }


def read_members(file: str | os.PathLike) -> Iterator[tuple[int, tarfile.TarInfo]]:
    """The members of a tar file, each with the number of its archive, because tar files may be concatenated.

    Says where the file is damaged, and goes on behind that; says where it is cut off.

    Raises:
        ValueError: If the file is compressed, or not a tar file.
    """
    with open(file, "rb") as content:
        length, position, number = os.fstat(content.fileno()).st_size, 0, 0
        while True:
            content.seek(position)
            try:
                with tarfile.open(fileobj=content, mode="r:") as archive:
                    while (member := archive.next()) is not None:
                        vars(archive)["members"].clear()  # it keeps them all otherwise
                        if member.offset_data + member.size > length:
                            logger.warning(f"{file} is cut off in {member.name}; the samples before it are used")
                            return
                        position = archive.offset
                        yield number, member
                    position = archive.offset
            except (tarfile.TarError, ValueError) as error:
                if position == 0:
                    raise ValueError(
                        f"{file} cannot be read as a tar file: {error}; a compressed one (.tar.gz) has to be unpacked "
                        "first"
                    ) from error
                position += tarfile.BLOCKSIZE
            found = _next_header(file, content, position, length)
            if found is None:
                return
            position, has_ended = found
            number += has_ended


def _next_header(file: str | os.PathLike, content: BinaryIO, start: int, length: int) -> tuple[int, bool] | None:
    """Where the next header stands at or after a place without one, and whether an end mark, zeros, lies between."""
    if start >= length:
        logger.warning(f"{file} has no end mark; it may be cut off. Its samples are used")
        return None
    content.seek(start)
    has_ended, damaged, found = False, 0, None
    for position in range(start, length, tarfile.BLOCKSIZE):
        block = content.read(tarfile.BLOCKSIZE)
        if not block.strip(b"\0"):
            has_ended = True
            continue
        try:
            tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            damaged += len(block)
            continue
        found = position, has_ended
        break
    if damaged:
        logger.warning(
            f"{file} is damaged or cut off at byte {start}: {damaged} bytes cannot be read as members; the samples "
            "before and behind them are used"
        )
    return found
