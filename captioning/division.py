"""Divides the inputs of a run into shards, once: files that list each shard's images, which all processes read.

A tar, parquet or list file is a shard as it is. Single images, and those in folders, are divided by a hash of their
names. So neither a process nor a later run needs the names of all images in memory.
"""

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from vlv.errors import UserError
from vlv.files import to_json
from vlv.image_files import walk_images

from .inputs import Input

TABLE_SUFFIXES = (".tar", ".parquet")
LIST_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
BUFFER = 2**23
"""Bytes of lines in memory while the lists of shards are written."""

Line = dict[str, Any]
"""Of a list: `{"name", "path"}` of an image, with `"problem"` if it cannot be read, or `{"rows": file, "prefix"}`."""


def shard_name(index: int, count: int) -> str:
    """The name of a shard's files, without a suffix."""
    return f"shard-{index:05}-of-{count:05}"


def find_files(paths: Sequence[str]) -> list[tuple[Path, str]]:
    """The files with many images among arguments and in folders that hold such, each with the prefix of its names.

    Raises:
        UserError: If an argument does not exist, or lies in another.
    """
    _refuse_overlaps(paths)
    found = []
    for argument in paths:
        path, suffix = Path(argument), Path(argument).suffix.lower()
        if path.is_dir():
            files = _tables_in(path)
            start = "" if len(paths) == 1 else f"{os.path.normpath(argument)}/"
            found += [(file, f"{start}{file.relative_to(path).as_posix()}/") for file in files]
        elif not os.path.lexists(path):
            raise UserError(f"{argument} does not exist")
        elif suffix in (*TABLE_SUFFIXES, *LIST_SUFFIXES):
            found.append((path, f"{path.name if len(paths) == 1 else os.path.normpath(argument)}/"))
    return list({os.path.abspath(file): (file, prefix) for file, prefix in found}.values())


def _refuse_overlaps(paths: Sequence[str]) -> None:
    folders = {os.path.abspath(path): path for path in paths if os.path.isdir(path)}
    for path in paths:
        for parent in Path(os.path.abspath(path)).parents:
            if (folder := folders.get(str(parent))) is not None:
                raise UserError(f"{path} lies in {folder}, which is given, too; give one of them")


def _tables_in(folder: Path) -> list[Path]:
    """The tar files below a folder, or else its parquet files. Hidden files and folders are left out."""
    found: dict[str, list[Path]] = {suffix: [] for suffix in TABLE_SUFFIXES}
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            suffix = os.path.splitext(name)[1].lower()
            if suffix in found and not name.startswith("."):
                found[suffix].append(Path(place, name))
    return found[".tar"] or found[".parquet"]


def divide(paths: Sequence[str], count: int, folder: Path) -> dict[str, Any]:
    """Writes the list of each shard into a folder, which exists and is empty.

    Returns:
        The numbers of single images, of files with many, and of files that are neither.

    Raises:
        UserError: If there are no inputs, or more shards than inputs can fill.
    """
    files = find_files(paths)
    lines: defaultdict[int, bytearray] = defaultdict(bytearray)
    held, images, left_out = 0, 0, Counter[str]()

    def flush() -> None:
        for index, data in lines.items():
            with open(list_path(folder, index, count), "ab") as file:
                file.write(data)
        lines.clear()

    def add(index: int, line: Line) -> int:
        data = to_json(line, None) + b"\n"
        lines[index] += data
        return len(data)

    for number, (file, prefix) in enumerate(files):
        add(number % count, {"rows": os.path.abspath(file), "prefix": prefix})
    for name, path, problem in _single_images(paths, {os.path.abspath(file) for file, _ in files}, left_out):
        line = {"name": name, "path": os.path.abspath(path)} | ({"problem": problem} if problem else {})
        held += add(_hash(name) % count, line)
        images += 1
        if held > BUFFER:
            flush()
            held = 0
    flush()
    if not images and not files:
        others = ", ".join(f"{number} {suffix}" for suffix, number in left_out.most_common(5))
        raise UserError(f"no images in {', '.join(paths)}" + (f"; it holds {others}" if others else ""))
    if not images and count > len(files):
        raise UserError(
            f"--shards {count}: the inputs are {len(files)} files; a file is a shard, so give at most that"
        )
    return {"images": images, "files": len(files), "left_out": sum(left_out.values())}


def _single_images(
    paths: Sequence[str], files: set[str], left_out: Counter[str]
) -> Iterator[tuple[str, Path, str | None]]:
    """Name, path and problem of each image that is a file of its own. `files` are those with many images."""
    for argument in dict.fromkeys(map(os.path.normpath, paths)):
        path = Path(argument)
        start = "" if len(paths) == 1 else f"{argument}/"
        if path.is_dir():
            if any(Path(file).is_relative_to(os.path.abspath(path)) for file in files):
                continue  # images beside tar or parquet files belong to those
            for image, problem in walk_images(path, left_out):
                name = image.relative_to(path).as_posix() if image != path else argument
                yield start + name, image, problem
        elif os.path.abspath(path) not in files:
            yield path.name if len(paths) == 1 else argument, path, None


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest())


def list_path(folder: Path, index: int, count: int) -> Path:
    """The file that lists the inputs of a shard; a shard without inputs has none."""
    return folder / f"{shard_name(index, count)}.jsonl"


def read_division(folder: Path, index: int, count: int) -> list[Input]:
    """The inputs of a shard. No two have the same name.

    Raises:
        UserError: If a file with many images cannot be read.
    """
    path = list_path(folder, index, count)
    inputs: dict[str, Input] = {}
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    for line in map(json.loads, filter(None, lines)):
        if "rows" not in line:
            inputs.setdefault(line["name"], Input(line["name"], Path(line["path"]), problem=line.get("problem")))
            continue
        try:
            source = open_rows(line["rows"])
        except (OSError, ValueError) as error:
            raise UserError(f"{line['rows']} cannot be read: {error}") from error
        for number in range(len(source)):
            name = line["prefix"] + _row_name(source, number, line["rows"])
            if name in inputs:  # concatenated tar files may have members of one name
                name = f"{name}#{number}"
            row = partial(read_row, line["rows"], number)
            inputs[name] = Input(name, Path(line["rows"]), member=str(number), read=row)
    return list(inputs.values())


def _row_name(source: Any, number: int, file: str) -> str:
    """What an image is called in its file: its number in a parquet file, its member in a tar, its path in a list."""
    if file.lower().endswith(".parquet"):
        return str(number)
    name = source.name(number)
    for start in (f"{file}:", f"{os.path.dirname(file)}/"):
        name = name.removeprefix(start)
    return name


@lru_cache(maxsize=4)
def open_rows(file: str) -> Any:
    """The `vlv.train.data` source of a tar, parquet or list file. Each process opens a file once."""
    from vlv.train.data.captions import IMAGE_COLUMN
    from vlv.train.data.loading import open_source

    return open_source(file, "train", IMAGE_COLUMN, None, None)


def read_row(file: str, number: int) -> Any:
    """An image of a tar, parquet or list file: bytes, an array or a path. Raises `OSError` or `ValueError`."""
    from vlv.train.data.source import UnreadableImage

    image = open_rows(file)[number]["image"]
    if image is None or isinstance(image, UnreadableImage):
        raise ValueError("the row has no image" if image is None else image.reason)
    return image
