"""Divides the inputs of a run into shards, once: files that list each shard's images, which all processes read.

A tar, parquet or list file is a shard as it is. Single images, and those in folders, are divided by a hash of their
names. So neither a process nor a later run needs the names of all images in memory.
"""

import hashlib
import json
import os
import stat
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from vlv.errors import UserError
from vlv.files import to_json
from vlv.image_files import walk_images

from .inputs import Input

TABLE_SUFFIXES = (".tar", ".parquet")
LIST_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
ANEW = "begin the run anew in another --output-dir"
BUFFER = 2**23
"""Bytes of lines in memory while the lists of shards are written."""

Line = dict[str, Any]
"""Of a list: `{"name", "path"}` of an image, with `"problem"` if it cannot be read, or `{"rows": file, "prefix"}`.

Regular files have `"size"` and `"mtime_ns"`, by which a file that changes later is found.
"""


def shard_name(index: int, count: int) -> str:
    """The name of a shard's files, without a suffix."""
    return f"shard-{index:05}-of-{count:05}"


def find_files(paths: Sequence[str], image_column: str) -> list[tuple[Path, str]]:
    """The files with many images among arguments and in folders that hold such, each with the prefix of its names.

    Raises:
        UserError: If an argument does not exist, or lies in another, or a folder holds images beside such files.
    """
    _refuse_overlaps(paths)
    found = []
    for argument in paths:
        path, suffix = Path(argument), Path(argument).suffix.lower()
        if path.is_dir():
            files = _tables_in(path, image_column)
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


def _tables_in(folder: Path, image_column: str) -> list[Path]:
    """The tar files below a folder, or else its parquet files. Hidden files and folders are left out.

    Parquet files without images, which a downloader writes beside tar files or images, are left out, too.
    """
    found: dict[str, list[Path]] = {suffix: [] for suffix in TABLE_SUFFIXES}
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            suffix = os.path.splitext(name)[1].lower()
            if suffix in found and not name.startswith("."):
                found[suffix].append(Path(place, name))
    tables = found[".tar"] or found[".parquet"]
    image = next((path for path, problem in walk_images(folder) if problem is None), None) if tables else None
    if image is None:
        return tables
    if not found[".tar"] and _describes_images(tables[0], image_column, folder):
        return []
    raise UserError(
        f"{folder} holds both {tables[0].relative_to(folder)} and single images such as {image.relative_to(folder)}; "
        "give the files, or folders of single images, as arguments of their own"
    )


def _describes_images(file: Path, image_column: str, folder: Path) -> bool:
    from vlv.train.data.loading import is_metadata

    try:
        return is_metadata(str(file), image_column, folder)
    except (OSError, ValueError):  # a damaged file, which is named when it is read
        return False


def divide(paths: Sequence[str], count: int, folder: Path, image_column: str = "image") -> dict[str, Any]:
    """Writes the list of each shard into a folder, which exists and is empty, and brings them to the disk.

    Returns:
        The numbers of single images, of files with many, and of files that are neither; and of images and files of
        each shard, as `of_shards`.

    Raises:
        UserError: If there are no inputs, or more shards than inputs can fill.
    """
    files = find_files(paths, image_column)
    of_shards = [[0, 0] for _ in range(count)]
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
        add(number % count, {"rows": os.path.abspath(file), "prefix": prefix} | _status(file))
        of_shards[number % count][1] += 1
    for name, path, problem in _single_images(paths, {os.path.abspath(file) for file, _ in files}, left_out):
        line = {"name": name, "path": os.path.abspath(path)} | ({"problem": problem} if problem else _status(path))
        index = _hash(name) % count
        held += add(index, line)
        of_shards[index][0] += 1
        images += 1
        if held > BUFFER:
            flush()
            held = 0
    flush()
    for path in folder.iterdir():
        sync_file(path)
    if not images and not files:
        others = ", ".join(f"{number} {suffix}" for suffix, number in left_out.most_common(5))
        raise UserError(f"no images in {', '.join(paths)}" + (f"; it holds {others}" if others else ""))
    if not images and count > len(files):
        raise UserError(
            f"--shards {count}: the inputs are {len(files)} files; a file is a shard, so give at most that"
        )
    return {"images": images, "files": len(files), "left_out": sum(left_out.values()), "of_shards": of_shards}


def sync_file(path: Path) -> None:
    """Brings a file to the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _status(path: Path) -> Line:
    """Size and time of a regular file; nothing of others, and of one that is gone, which is named when it is read."""
    try:
        status = os.stat(path)
    except OSError:
        return {}
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns} if stat.S_ISREG(status.st_mode) else {}


def _single_images(
    paths: Sequence[str], files: set[str], left_out: Counter[str]
) -> Iterator[tuple[str, Path, str | None]]:
    """Name, path and problem of each image that is a file of its own. `files` are those with many images."""
    for argument in dict.fromkeys(map(os.path.normpath, paths)):
        path = Path(argument)
        start = "" if len(paths) == 1 else f"{argument}/"
        if path.is_dir():
            if any(Path(file).is_relative_to(os.path.abspath(path)) for file in files):
                continue  # a folder of tar or parquet files has no single images
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


def read_division(
    folder: Path, index: int, count: int, expected: Sequence[int], image_column: str = "image"
) -> list[Input]:
    """The inputs of a shard. No two have the same name. A file of many images that cannot be read is one bad input.

    Args:
        expected: The numbers of images and of files in the list, as `divide` returns them.

    Raises:
        UserError: If the list is damaged, or does not have as many.
    """
    lines = _read_list(list_path(folder, index, count), expected)
    inputs: dict[str, Input] = {}
    for line in lines:
        if "rows" not in line:
            read = partial(unchanged_file, line["path"], line["size"], line["mtime_ns"]) if "size" in line else None
            item = Input(line["name"], Path(line["path"]), problem=line.get("problem"), read=read)
            inputs.setdefault(item.name, item)
            continue
        try:
            if "size" in line:
                unchanged_file(line["rows"], line["size"], line["mtime_ns"])
            source = open_rows(line["rows"], image_column)
        except (OSError, ValueError) as error:
            name = line["prefix"].removesuffix("/")
            inputs[name] = Input(name, Path(line["rows"]), problem=f"it cannot be read: {error}")
            continue
        for number in range(len(source)):
            name = line["prefix"] + _row_name(source, number, line["rows"])
            if name in inputs:  # concatenated tar files may have members of one name
                name = f"{name}#{number}"
            row = partial(read_row, line["rows"], number, image_column)
            inputs[name] = Input(name, Path(line["rows"]), member=str(number), read=row)
    return list(inputs.values())


def _read_list(path: Path, expected: Sequence[int]) -> list[Line]:
    """The lines of a list. Raises `UserError` if it has others than expected."""
    try:
        text = path.read_text(encoding="utf-8") if any(expected) else ""
        lines = [json.loads(line) for line in text.split("\n") if line]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}, the list of a shard's inputs, is damaged or missing ({error}); {ANEW}") from error
    files = sum("rows" in line for line in lines)
    if [len(lines) - files, files] != list(expected):
        raise UserError(
            f"{path} lists {len(lines) - files} images and {files} files, and run.json says {expected[0]} and "
            f"{expected[1]}; {ANEW}"
        )
    return lines


def owner(folder: Path, index: int, count: int, expected: Sequence[int]) -> Callable[[str], bool]:
    """A function that says of a name whether its image belongs to a shard. No two shards have an image.

    Args:
        expected: As of `read_division`, whose errors it raises.
    """
    lines = _read_list(list_path(folder, index, count), expected) if expected[1] else []
    files = tuple(line["prefix"] for line in lines if "rows" in line)
    return lambda name: f"{name}/".startswith(files) or _hash(name) % count == index


def unchanged_file(path: str, size: int, mtime_ns: int) -> str:
    """The path. Raises `ValueError` if the file has another size or time, and `OSError` if it is gone."""
    status = os.stat(path)
    if (status.st_size, status.st_mtime_ns) != (size, mtime_ns):
        raise ValueError("the file has changed since the run was begun; caption it in a run with another --output-dir")
    return path


def _row_name(source: Any, number: int, file: str) -> str:
    """What an image is called in its file: its number in a parquet file, its member in a tar, its path in a list."""
    if file.lower().endswith(".parquet"):
        return str(number)
    name = source.name(number)
    for start in (f"{file}:", f"{os.path.dirname(file)}/"):
        name = name.removeprefix(start)
    return name


@lru_cache(maxsize=4)
def open_rows(file: str, image_column: str) -> Any:
    """The `vlv.train.data` source of a tar, parquet or list file. Each process opens a file once."""
    from vlv.train.data.loading import open_source

    return open_source(file, "train", image_column, None, None)


def read_row(file: str, number: int, image_column: str) -> Any:
    """An image of a tar, parquet or list file: bytes, an array or a path. Raises `OSError` or `ValueError`."""
    from vlv.train.data.source import UnreadableImage

    image = open_rows(file, image_column)[number]["image"]
    if image is None or isinstance(image, UnreadableImage):
        raise ValueError("the row has no image" if image is None else image.reason)
    return image
