"""Files with many images: tar files (WebDataset), parquet files, and lists of images. Nothing is unpacked."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from vlv.image_files import image_suffixes, is_url

from .downloads import download
from .inputs import Input, Named

if TYPE_CHECKING:
    from vlv.train.data import Source

SHARD_SUFFIXES = (".tar", ".parquet")
LIST_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
OPEN_TABLES = 2
"""Parquet and list files that are open at a time. Images of a file mostly follow each other."""

Status = tuple[int, int]
"""Size and time of change (ns) of a file."""


def is_table(item: Input) -> bool:
    """Whether an input is a file with many images, by its suffix."""
    return item.is_file and item.problem is None and item.path.suffix.lower() in (*SHARD_SUFFIXES, *LIST_SUFFIXES)


def expand_tables(
    found: Iterable[Named], column: str, timeout: float, left_out: Counter[str], root: str | None = None
) -> Iterator[Named]:
    """The inputs, with its images in place of each file that holds many.

    They are called `FILE/MEMBER` in a tar file, `FILE/ROW` in a parquet file, and `FILE/PATH` in a list. Of equal
    names the second is `NAME#2`. A damaged file is one bad input.

    Args:
        column: Of the images in parquet files and lists.
        timeout: Seconds that a download may take.
        left_out: Counts the members of tar files that are not images, by suffix.
        root: The folder that paths in parquet files and lists start from; by default that of the file.
    """
    for item, full in found:
        if not is_table(item):
            yield item, full
            continue
        try:
            for member, read, version in _members(str(item.path), column, timeout, left_out, root):
                row = Input(f"{item.name}/{member}", item.path, member=member, read=read, version=version)
                yield row, f"{full}/{member}"
        except (OSError, ValueError) as error:
            yield replace(item, problem=str(error)), full


def _members(
    file: str, column: str, timeout: float, left_out: Counter[str], root: str | None
) -> Iterator[tuple[str, Callable[[], Any], str | None]]:
    """What each image of a file is called, what reads it, and its `version`. Raises `OSError` or `ValueError`."""
    from vlv.train.data.lists import PROBLEM

    status = file_status(file)
    if file.lower().endswith(".tar"):
        for member, offset, size in tar_images(file, left_out):
            yield member, partial(_read_member, file, status, offset, size), None
        return
    table = open_table(file, column, status, root)
    folder = os.path.dirname(file) if root is None else os.fspath(Path(root))
    is_list, names = not file.lower().endswith(".parquet"), Counter[str]()
    for row in range(len(table)):
        read = partial(_read_row, file, column, status, root, row, timeout)
        if is_list:
            item = table[row]
            image = item["image"]
            name = str(image).removeprefix(f"{folder}/" if folder else "")
            if PROBLEM in item:  # it is called by list and line
                name = name.removeprefix(f"{os.path.basename(file)}, ")
            names[name] += 1
            yield _numbered(name, names[name]), read, file_version(image)
        else:
            yield str(row), read, None


@lru_cache(maxsize=OPEN_TABLES)
def open_table(file: str, column: str, status: Status, root: str | None) -> "Source":
    """The `vlv.train.data` source of a parquet or list file that has this status. Raises `OSError` or `ValueError`."""
    from vlv.train.data.loading import open_source

    return open_source(file, "train", column, None, root, keeps_unreadable=True)


def _read_row(file: str, column: str, status: Status, root: str | None, row: int, timeout: float) -> Any:
    _require_same(file, status)
    return read_image(open_table(file, column, status, root), row, timeout)


def read_image(source: "Source", row: int, timeout: float) -> Any:
    """The image of a row of a source. Raises `OSError` or `ValueError` if it cannot be read."""
    from vlv.train.data.lists import PROBLEM, ListDataset

    item = source[row]
    image = item["image"]
    if problem := item.get(PROBLEM):
        raise ValueError(problem)
    if isinstance(source, ListDataset) and not is_url(image) and not os.path.isfile(image):
        raise ValueError(f"{image} {'is not a file' if os.path.exists(image) else 'does not exist'}")
    return image_content(image, timeout)


def image_content(image: Any, timeout: float) -> Any:
    """The image of a row: bytes, an array, a path or base64. Raises `ValueError` if it has none."""
    from vlv.train.data.source import UnreadableImage

    if isinstance(image, UnreadableImage):
        raise ValueError(image.reason)
    if image is None:
        raise ValueError("the row has no image")
    if not isinstance(image, bytes | str | os.PathLike | np.ndarray):
        raise ValueError(f"the row has {type(image).__name__} {image!r:.40} in place of an image")
    return download(image, timeout) if isinstance(image, str) and is_url(image) else image


def tar_images(file: str, left_out: Counter[str]) -> Iterator[tuple[str, int, int]]:
    """The images of a tar file, by their suffixes: name, offset and size in bytes. Hidden members are left out.

    Raises:
        OSError, ValueError: If it cannot be read as a tar file, or holds no image.
    """
    from vlv.train.data.shards import read_members

    names: Counter[str] = Counter()
    for _, member in read_members(file):
        path = PurePosixPath(member.name)
        if not member.isfile() or path.name.startswith("."):
            continue
        if path.suffix.lower() not in image_suffixes():
            left_out[path.suffix.lower() or path.name] += 1
            continue
        names[member.name] += 1
        yield _numbered(member.name, names[member.name]), member.offset_data, member.size
    if not names:
        raise ValueError(f"no images in {file}; expected members such as 0001.jpg")


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}#{number}"


def _read_member(file: str, status: Status, offset: int, size: int) -> bytes:
    _require_same(file, status)
    with open(file, "rb") as archive:
        archive.seek(offset)
        data = archive.read(size)
    if len(data) < size:
        raise ValueError(f"{file} is cut off")
    return data


def file_status(file: str) -> Status:
    """Raises `OSError` if there is no such file."""
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def file_version(image: Any) -> str:
    """Tells the version of an image file from others: a URL by itself; "" for what is neither."""
    if isinstance(image, str) and is_url(image):
        return image
    try:
        return "{} bytes, {} ns".format(*file_status(image))
    except (OSError, TypeError, ValueError):
        return ""


def _require_same(file: str, status: Status) -> None:
    if file_status(file) != status:
        raise ValueError(f"{file} changed after its images were listed; run again when it is complete")
