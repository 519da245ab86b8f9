"""WebDataset shards: tar files whose members are read by their offsets, without unpacking and without reading on."""

import hashlib
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers.utils import logging

from vlv.image_files import image_suffixes

from .captions import CAPTION_COLUMNS, WHOLE, count_alternatives, find_column, sidecar_captions
from .source import EncodedImage, Source, hash_files
from .stored import stored_arrays

logger = logging.get_logger(__name__)

CAPTION_SUFFIXES = (".txt", ".caption", ".json")
"""Of a sample's captions the first of these counts."""
MAX_OPEN_FILES = 32


class TarSource(Source):
    """Tar files of images and captions, grouped by the name before the first dot as WebDataset does.

    A sample has an image (`.jpg`, `.png`, `.webp` or another suffix that Pillow reads), and for captions a `.txt`, a
    `.caption`, or a `.json` with a caption column. An index of offsets is made of each file once.

    Raises:
        ValueError: If a file cannot be read, or no sample has an image.
    """

    def __init__(self, files: Sequence[str | os.PathLike], caption_column: str | None, caption_lines: str = "first"):
        self.files = [str(file) for file in files]
        self.has_captions, self.caption_column, self.caption_lines = (
            caption_column is not None,
            caption_column,
            caption_lines,
        )
        indexes = [stored_arrays(file, "tar", _index, file) for file in self.files]
        sizes = [len(index["members"]) for index in indexes]
        self._sizes, self._ends = np.array(sizes, dtype=np.int64), np.cumsum(sizes)
        if not sum(sizes):
            raise ValueError(f"no images in {', '.join(self.files[:3])}; expected members such as 0001.jpg, 0001.txt")
        self._members = np.concatenate([index["members"] for index in indexes])
        self._names = [index["names"].tobytes() for index in indexes]
        self._recent: tuple[int, list[bytes]] = (-1, [])
        self._handles: OrderedDict[int, Any] = OrderedDict()
        self._process = os.getpid()

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
        if (
            os.getpid() != self._process
        ):  # after a fork; positions of shared handles are not used, handles may be closed
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
            assert self.caption_column is not None
            return values[find_column(list(values), self.caption_column, CAPTION_COLUMNS, self.name(number))]
        except (UnicodeDecodeError, json.JSONDecodeError, TypeError, ValueError):
            return None

    def count_captions(self) -> np.ndarray:
        what, ends = f"captions {self.caption_column} {self.caption_lines == WHOLE}", self._ends.tolist()
        shards = zip(self.files, [0, *ends], ends, strict=False)
        return np.concatenate([stored_arrays(f, what, self._count, a, b)["counts"] for f, a, b in shards])

    def _count(self, start: int, end: int) -> dict[str, np.ndarray]:
        counts = [count_alternatives(self.caption(number)) for number in range(start, end)]
        return {"counts": np.array(counts, dtype=np.int32)}

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
    samples: dict[str, dict[str, tuple[int, int, str]]] = {}
    length = os.stat(file).st_size
    for member in _members(file):
        if not member.isfile() or member.offset_data + member.size > length:
            continue
        folder, _, base = member.name.rpartition("/")
        if base.startswith("."):
            continue
        stem, dot, suffix = base.partition(".")
        kind = dot + suffix.lower()
        slot = "image" if kind in image_suffixes() else kind if kind in CAPTION_SUFFIXES else None
        if slot is not None:
            samples.setdefault(f"{folder}/{stem}", {}).setdefault(slot, (member.offset_data, member.size, member.name))
    rows, names = [], []
    for parts in samples.values():
        if "image" not in parts:
            continue
        kind = next((k for k, suffix in enumerate(CAPTION_SUFFIXES) if suffix in parts), -1)
        caption = parts[CAPTION_SUFFIXES[kind]] if kind >= 0 else (0, 0, "")
        rows.append((*parts["image"][:2], *caption[:2], kind))
        names.append(os.fsencode(parts["image"][2]))
    return {
        "members": np.array(rows, dtype=MEMBER),
        "names": np.frombuffer(b"\0".join(names), dtype=np.uint8),
    }


def _members(file: str | os.PathLike):
    """The members of a tar file up to where it is cut off, if it is. Says so.

    Raises:
        ValueError: If the file is compressed, or not a tar file.
    """
    try:
        with tarfile.open(file, "r:") as content:
            while (member := content.next()) is not None:
                vars(content)["members"].clear()  # it keeps them all otherwise
                if member.offset_data + member.size > os.stat(file).st_size:
                    logger.warning(f"{file} is cut off in {member.name}; the samples before it are used")
                yield member
    except tarfile.ReadError as error:
        if "unexpected end" in str(error):
            logger.warning(f"{file} is cut off; the samples before that are used")
            return
        raise ValueError(
            f"{file} cannot be read as a tar file: {error}; a compressed one (.tar.gz) has to be unpacked first"
        ) from error
