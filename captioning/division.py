"""Divides the inputs of a run into shards, once: files that list each shard's images, which all processes read.

A tar, parquet or list file is a shard as it is. Single images, those in folders, and URLs are divided by a hash of
their names, and a data set by ranges of its rows. So neither a process nor a later run needs the names of all images
in memory.
"""

import hashlib
import json
import os
import stat
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlv.errors import UserError
from vlv.files import to_json
from vlv.image_files import is_url, walk_images

from .choices import TIME_LIMIT
from .dataset_rows import DatasetArguments, dataset_commit, dataset_fingerprint, rows_of_dataset
from .inputs import Input, Named, no_images, once
from .sources import at_url, is_glob, renamed, require_argument, walk
from .tables import SHARD_SUFFIXES, expand_tables, is_table

if TYPE_CHECKING:
    from vlv.train.data import Source

ANEW = "begin the run anew in another --output-dir"
BUFFER = 2**23
"""Bytes of lines in memory while the lists of shards are written."""

Line = dict[str, Any]
"""Of a list: `{"name", "path"}` of an image, with `"problem"` if it cannot be read, `{"name", "url"}`, or
`{"rows": file, "prefix"}`.

Regular files have `"size"` and `"mtime_ns"`, by which a file that changes later is found.
"""


def shard_name(index: int, count: int) -> str:
    """The name of a shard's files, without a suffix."""
    return f"shard-{index:05}-of-{count:05}"


def absolute(argument: str) -> str:
    """An argument whatever the working folder."""
    return argument if is_url(argument) else os.path.abspath(argument)


def find_inputs(paths: Sequence[str], image_column: str, left_out: Counter[str]) -> Iterator[Input]:
    """The images, and the files with many, of all arguments: named relative to the argument, or as given of several.

    Args:
        left_out: Counts what is neither, by suffix.

    Raises:
        UserError: If an argument does not exist, or lies in another, or a folder holds images beside tar or parquet
            files.
    """
    _refuse_overlaps(paths)
    arguments = list({absolute(path): path for path in paths}.values())
    for argument in arguments:
        require_argument(argument)
    found: Iterator[Named] = (named for argument in arguments for named in _found_in(argument, image_column, left_out))
    if len(arguments) > 1 and not all(map(os.path.isdir, arguments)):  # an image may be named twice
        found = once(found)
    for item, full in found:
        yield renamed(item, full) if len(arguments) > 1 else item


def _found_in(argument: str, image_column: str, left_out: Counter[str]) -> Iterator[Named]:
    folder = Path(argument)
    tables = _tables_in(folder, image_column) if folder.is_dir() else []
    for file in tables:
        yield Input(file.relative_to(folder).as_posix(), file), file.as_posix()
    if not tables:  # a folder of tar or parquet files has no single images
        yield from walk(argument, left_out)


def _refuse_overlaps(paths: Sequence[str]) -> None:
    folders = {os.path.abspath(path): path for path in paths if os.path.isdir(path)}
    for path in paths:
        if is_url(path) or is_glob(path):
            continue
        for parent in Path(os.path.abspath(path)).parents:
            if (folder := folders.get(str(parent))) is not None:
                raise UserError(f"{path} lies in {folder}, which is given, too; give one of them")


def _tables_in(folder: Path, image_column: str) -> list[Path]:
    """The tar files below a folder, or else its parquet files. Hidden files and folders are left out.

    Parquet files without images, which a downloader writes beside tar files or images, are left out, too.
    """
    found: dict[str, list[Path]] = {suffix: [] for suffix in SHARD_SUFFIXES}
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
    of_shards = [[0, 0] for _ in range(count)]
    lines: defaultdict[int, bytearray] = defaultdict(bytearray)
    held, images, tables, left_out = 0, 0, 0, Counter[str]()

    def flush() -> None:
        for index, data in lines.items():
            with open(list_path(folder, index, count), "ab") as file:
                file.write(data)
        lines.clear()

    for item in find_inputs(paths, image_column, left_out):
        if is_table(item):
            index = tables % count
            tables += 1
        else:
            index = _hash(item.name) % count
            images += 1
        of_shards[index][is_table(item)] += 1
        line = to_json(_line(item), None) + b"\n"
        lines[index] += line
        held += len(line)
        if held > BUFFER:
            flush()
            held = 0
    flush()
    for path in folder.iterdir():
        sync_file(path)
    if not images and not tables:
        raise no_images(paths, left_out)
    if not images and count > tables:
        raise UserError(f"--shards {count}: the inputs are {tables} files; a file is a shard, so give at most that")
    return {"images": images, "files": tables, "left_out": sum(left_out.values()), "of_shards": of_shards}


def _line(item: Input) -> Line:
    if item.remote is not None:
        return {"name": item.name, "url": item.remote}
    path = os.path.abspath(item.path)
    if is_table(item):
        return {"rows": path, "prefix": f"{item.name}/"} | _status(item.path)
    return {"name": item.name, "path": path} | ({"problem": item.problem} if item.problem else _status(item.path))


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


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest())


def list_path(folder: Path, index: int, count: int) -> Path:
    """The file that lists the inputs of a shard; a shard without inputs has none."""
    return folder / f"{shard_name(index, count)}.jsonl"


def read_division(
    folder: Path,
    index: int,
    count: int,
    expected: Sequence[int],
    image_column: str = "image",
    url_timeout: float = TIME_LIMIT,
    image_root: str | None = None,
) -> list[Input]:
    """The inputs of a shard. No two have the same name. A file of many images that cannot be read is one bad input.

    Args:
        expected: The numbers of images and of files in the list, as `divide` returns them.
        url_timeout: Seconds that a download may take.
        image_root: As of `expand_tables`.

    Raises:
        UserError: If the list is damaged, or does not have as many.
    """
    lines = _read_list(list_path(folder, index, count), expected)
    found = ((item, item.name) for item in (_listed(line, url_timeout) for line in lines))
    inputs: dict[str, Input] = {}
    for item, _ in expand_tables(found, image_column, url_timeout, Counter(), image_root):
        inputs.setdefault(item.name, item)
    return list(inputs.values())


def _listed(line: Line, url_timeout: float) -> Input:
    """The image, or the file with many, of a line. One that has changed since cannot be read."""
    if "url" in line:
        return at_url(line["url"], url_timeout)
    if "rows" not in line:
        read = partial(unchanged_file, line["path"], line["size"], line["mtime_ns"]) if "size" in line else None
        return Input(line["name"], Path(line["path"]), problem=line.get("problem"), read=read)
    problem = None
    try:
        if "size" in line:
            unchanged_file(line["rows"], line["size"], line["mtime_ns"])
    except (OSError, ValueError) as error:
        problem = f"it cannot be read: {error}"
    return Input(line["prefix"].removesuffix("/"), Path(line["rows"]), problem=problem)


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


def divide_dataset(source: "Source", count: int) -> dict[str, Any]:
    """What `divide` returns, of a data set that is divided by ranges of its rows, its `fingerprint` and its `commit`.

    Raises:
        UserError: If it has no rows, or cannot be read.
    """
    if not len(source):
        raise UserError("the data set has no rows")
    ends = [index * len(source) // count for index in range(count + 1)]
    of_shards = [[stop - start, 0] for start, stop in pairwise(ends)]
    found = {"images": len(source), "files": 0, "left_out": 0, "of_shards": of_shards}
    return found | {"fingerprint": dataset_fingerprint(source), "commit": dataset_commit(source)}


def dataset_rows(counts: Mapping[str, Any], index: int) -> range:
    """The rows of a shard, of what `divide_dataset` has returned."""
    start = sum(images for images, _ in counts["of_shards"][:index])
    return range(start, start + counts["of_shards"][index][0])


def require_same_dataset(dataset: DatasetArguments, source: "Source", counts: Mapping[str, Any]) -> None:
    """Raises `UserError` if a data set is not the one that was divided."""
    if (len(source), dataset_fingerprint(source)) != (counts["images"], counts.get("fingerprint")):
        raise UserError(f"--dataset {dataset.name} has changed since the run was begun; {ANEW}")


def read_dataset_rows(
    dataset: DatasetArguments, source: "Source", counts: Mapping[str, Any], index: int, url_timeout: float
) -> list[Input]:
    """The inputs of a shard of a data set."""
    return list(rows_of_dataset(dataset, source, url_timeout, dataset_rows(counts, index), versions=False))
