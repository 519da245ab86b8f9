"""Inputs of `vlv caption`, found while captions are written: folders, globs, lists, URLs, shards and data sets.

In memory are the first `LOOKAHEAD` inputs, about 100 bytes of each source where an image might be named twice, the
names in the folder that is searched, and those of the images in the tar file that is read. Several arguments with up
to `LISTED` images are listed first.
"""

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from glob import has_magic
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from huggingface_hub.errors import HTTPError

from vlv.errors import UserError
from vlv.image_files import is_image_file, walk_images

from .archives import read_member, tar_images
from .choices import TIME_LIMIT
from .downloads import download, is_url
from .inputs import (
    Input,
    Named,
    describe_left_out,
    files_of,
    no_images,
    once,
    require_existing,
    unique_names,
)

if TYPE_CHECKING:
    from vlv.train.data import Source

STDIN = "-"
SHARD_SUFFIXES = (".tar", ".parquet")
LOOKAHEAD = 1000
"""Inputs that are found before the model is loaded."""
OPEN_SHARDS = 2
"""Parquet files that are open at a time. Images of a file mostly follow each other."""
LISTED = 10_000
"""Several arguments with at most so many images are listed first, so that only names that clash get longer."""


@dataclass(frozen=True)
class DatasetArguments:
    """A data set, as the training reads it.

    Args:
        name: Folder, file, or `org/name` on the Hub.
        split: Split of a data set; None for `train`, or for all of a local folder that `vlv train` reads whole.
        column: Column of the images. Without one of the default name, other usual names are looked for.
        streaming: Whether its files are read while captions are written, and not downloaded first.
    """

    name: str
    split: str | None = None
    column: str = "image"
    streaming: bool = False


class Inputs:
    """The inputs of a run, found one by one.

    `first` are found at once; `total` is their number if there are no others, else None. `count` finds all of them
    once more, to count them.

    Args:
        paths: Image files, folders, globs, URLs, parquet files, tar files, or `-` for a list on standard input.
        dataset: A data set in their place.
        column: Of the images in parquet files.
        url_timeout: Seconds that a download may take.
        quiet_suffixes: Of files that are not named among those that are left out.

    Raises:
        UserError: If an argument does not exist, or no image is found.
    """

    def __init__(
        self,
        paths: Sequence[str],
        dataset: DatasetArguments | None = None,
        column: str = "image",
        url_timeout: float = TIME_LIMIT,
        quiet_suffixes: Sequence[str] = (),
    ):
        self._paths, self._dataset, self._column, self._timeout = list(paths), dataset, column, url_timeout
        self._quiet_suffixes = quiet_suffixes
        self.left_out: Counter[str] = Counter()
        self._length: int | None = None
        self._opened = lru_cache(maxsize=OPEN_SHARDS)(self._open_parquet)
        if dataset is not None:
            found = self._rows_of_dataset(dataset)
        else:
            for argument in paths:
                if not (argument == STDIN or is_url(argument) or is_glob(argument)):
                    require_existing(argument)
            found = self._find(self.left_out)
        at_once = 1 if STDIN in paths or (dataset and dataset.streaming) else LOOKAHEAD
        self.first = list(islice(found, at_once + 1))
        self._rest = found
        self.total = len(self.first) if len(self.first) <= at_once else self._length
        if not self.first:
            raise no_images(paths or [dataset.name if dataset else ""], self._named_left_out())
        if len(self.first) <= at_once:
            self._say_left_out()

    def __iter__(self) -> Iterator[Input]:
        yield from self.first
        found = len(self.first)
        for item in self._rest:
            found += 1
            yield item
        if found > len(self.first):
            self._say_left_out()

    def count(self) -> int | None:
        """The number of inputs, found by a search of its own; None if they can be found only once."""
        if self.total is not None or self._dataset is not None or STDIN in self._paths:
            return self.total
        return sum(1 for _ in self._find(Counter()))

    def _named_left_out(self) -> Counter[str]:
        return Counter({s: count for s, count in self.left_out.items() if s not in self._quiet_suffixes})

    def _say_left_out(self) -> None:
        if left_out := self._named_left_out():
            print(f"not images, left out: {describe_left_out(left_out)}", file=sys.stderr)

    def _find(self, left_out: Counter[str]) -> Iterator[Input]:
        """The inputs with names of their own: relative to the argument, or as given where names might clash."""
        if len(self._paths) == 1:
            found = self._found_in(self._paths[0], left_out)
            yield from (item for item, _ in (once(found) if self._paths[0] == STDIN else found))
            return
        found = once(named for argument in self._paths for named in self._found_in(argument, left_out))
        listed = [] if STDIN in self._paths else list(islice(found, LISTED + 1))
        if listed and len(listed) <= LISTED:
            yield from unique_names(listed)
            return
        for item, full in chain(listed, found):
            yield _renamed(item, full)

    def _found_in(self, argument: str, left_out: Counter[str]) -> Iterator[Named]:
        if argument == STDIN:
            for line in _lines_of_stdin():
                yield from self._found_in_line(line)
        elif is_url(argument):
            yield self._at_url(argument), argument
        elif is_glob(argument):
            yield from self._matching(argument, left_out)
        elif is_shard(argument):
            yield from self._rows_of_shard(argument, Path(argument).name, left_out)
        else:
            yield from files_of(argument, left_out)

    def _found_in_line(self, line: str) -> Iterator[Named]:
        """What a line of a list names. A path that does not exist is an input that cannot be read."""
        if is_url(line):
            yield self._at_url(line), line
            return
        path = Path(line)
        try:
            require_existing(line)
        except UserError as error:
            yield Input(path.as_posix(), path, problem=str(error)), path.as_posix()
            return
        found = self._rows_of_shard(line, path.name, Counter()) if is_shard(line) else files_of(line)
        yield from ((_renamed(item, full), full) for item, full in found)

    def _at_url(self, url: str) -> Input:
        return Input(url, Path(), remote=url, read=partial(download, url, self._timeout))

    def _matching(self, pattern: str, left_out: Counter[str]) -> Iterator[Named]:
        """The images and shards that a glob names, called by their path in the folder that it starts from."""
        folder = _fixed_folder(pattern)
        for path, problem in _matching_files(pattern, left_out):
            name = path.relative_to(folder).as_posix()
            if problem is None and is_shard(str(path)):
                yield from self._rows_of_shard(str(path), name, left_out)
            else:
                yield Input(name, path, problem=problem), path.as_posix()

    def _rows_of_shard(self, file: str, name: str, left_out: Counter[str]) -> Iterator[Named]:
        """The images of a tar or parquet file: `NAME/MEMBER` or `NAME/ROW`. A damaged file is one bad input."""
        path = Path(file)
        try:
            for member, read in self._members(file, left_out):
                item = Input(f"{name}/{member}", path, member=member, read=read)
                yield item, f"{path.as_posix()}/{member}"
        except (ValueError, OSError) as error:
            yield Input(name, path, problem=str(error)), path.as_posix()

    def _members(self, file: str, left_out: Counter[str]) -> Iterator[tuple[str, Callable[[], Any]]]:
        """What each image of a tar or parquet file is called, and what reads it. Raises `OSError` or `ValueError`."""
        status = _status(file)
        if file.lower().endswith(".tar"):
            for member, offset, size in tar_images(file, left_out):
                yield member, partial(_tar_member, file, status, offset, size)
            return
        length = len(self._open_parquet(file))
        if len(self._paths) == 1 and file == self._paths[0]:
            self._length = length
        for row in range(length):
            yield str(row), partial(self._parquet_row, file, status, row)

    def _open_parquet(self, file: str) -> "Source":
        from vlv.train.data import ParquetSource

        return ParquetSource([file], self._column, None)

    def _parquet_row(self, file: str, status: tuple[int, int], row: int) -> Any:
        _require_same(file, status)
        return _content(self._opened(file)[row]["image"], self._timeout)

    def _rows_of_dataset(self, dataset: DatasetArguments) -> Iterator[Input]:
        """The rows of a data set: `SPLIT/ROW`. Raises `UserError` if it cannot be opened."""
        from vlv.train.data.loading import find_dataset

        try:
            if dataset.streaming:
                stream = find_dataset(dataset.name, dataset.split or "train", streaming=True)
                return self._rows_of_stream(dataset, stream)
            source = _open_dataset(dataset)
            self._length = len(source)
            return self._rows_of_source(dataset, source)
        except (ValueError, OSError, HTTPError) as error:
            raise UserError(f"--dataset {dataset.name}: {error}") from error

    def _rows_of_stream(self, dataset: DatasetArguments, stream: Any) -> Iterator[Input]:
        """The rows as they come. Raises `UserError` with the number of a row that cannot be read."""
        from vlv.train.data import StreamSource

        is_folder = os.path.isdir(dataset.name)
        place = {"folder": dataset.name} if is_folder else {"repository": dataset.name}
        row = 0
        try:
            source = StreamSource(stream, dataset.name, dataset.column, None, **place)
        except ValueError as error:  # a column is missing
            raise UserError(f"--dataset {dataset.name}: {error}") from error
        try:
            for row, content in enumerate(source.stream):
                yield _named_row(dataset, row, partial(self._streamed, source, content))
                row += 1
        except Exception as error:  # of the libraries for data sets, tables, images and downloads
            reason = str(error).split("\n", maxsplit=1)[0] or type(error).__name__
            raise UserError(
                f"--dataset {dataset.name}: {dataset.split or 'train'}/{row} cannot be read: {reason:.300}; "
                "the captions before it are written"
            ) from error

    def _streamed(self, source: Any, row: dict[str, Any]) -> Any:
        return _content(source.image(row, source.name), self._timeout)

    def _rows_of_source(self, dataset: DatasetArguments, source: "Source") -> Iterator[Input]:
        from vlv.train.data.lists import ListDataset

        version = "" if isinstance(source, ListDataset) else _version(source)
        for row, item in enumerate(rows_of_source(dataset, source, url_timeout=self._timeout)):
            own = _version_of_file(source[row]["image"]) if isinstance(source, ListDataset) else version
            yield replace(item, version=own)


def rows_of_source(
    dataset: DatasetArguments, source: "Source", first: int = 0, url_timeout: float = TIME_LIMIT
) -> Iterator[Input]:
    """The rows of an open data set, or of a part of it.

    Args:
        dataset: What it is called.
        first: Number of the first row in the whole data set.
        url_timeout: Seconds that a download may take.
    """
    reader = _SourceRows(source, url_timeout)
    for row in range(len(source)):
        yield _named_row(dataset, first + row, partial(reader.read, row))


@dataclass(frozen=True)
class _SourceRows:
    """Reads the images of a data set that this process has opened."""

    source: "Source"
    url_timeout: float

    def read(self, row: int) -> Any:
        return _content(self.source[row]["image"], self.url_timeout)


def _content(image: Any, url_timeout: float) -> Any:
    """The image of a row as an `Input` has it. Raises `ValueError` if it has none."""
    from vlv.train.data.source import UnreadableImage

    if isinstance(image, UnreadableImage):
        raise ValueError(image.reason)
    if image is None:
        raise ValueError("the row has no image")
    if not isinstance(image, bytes | str | os.PathLike | np.ndarray):
        raise ValueError(f"the row has {type(image).__name__} {image!r:.40} in place of an image")
    return download(image, url_timeout) if isinstance(image, str) and is_url(image) else image


def _open_dataset(dataset: DatasetArguments) -> "Source":
    """A data set, or the split that is asked for. Raises `OSError` or `ValueError`.

    A local folder of images, tables or tar files has splits if the library `datasets` finds them; without a split
    that is asked for it is read whole.
    """
    from vlv.train.data.loading import find_dataset, open_source
    from vlv.train.data.tables import ColumnDataset

    folder, split = Path(dataset.name), dataset.split or "train"
    if (folder / "dataset_dict.json").is_file():
        if not (folder / split).is_dir():
            known = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir()))
            raise ValueError(f"it has no split {split!r}; it has {known}")
        return open_source(str(folder / split), split, dataset.column, None, None)
    if dataset.split is None or not folder.exists():
        return open_source(dataset.name, split, dataset.column, None, None)
    if not folder.is_dir() or (folder / "state.json").is_file():
        raise ValueError(f"it has no splits; leave out --split {split}")
    return ColumnDataset(find_dataset(dataset.name, split), dataset.column, None, folder)


def _named_row(dataset: DatasetArguments, row: int, read: Callable[[], Any], version: str = "") -> Input:
    name = f"{dataset.split or 'train'}/{row}"
    remote = None if Path(dataset.name).exists() else f"hf://datasets/{dataset.name}#{name}"
    return Input(name, Path(dataset.name), member=name, read=read, remote=remote, version=version)


def _version(source: "Source") -> str:
    """A hash of what is known of a data set without reading all of it; "" if that says nothing of its images."""
    try:
        if isinstance(source[0]["image"], str):  # images in files, which may change
            return ""
        files = getattr(source, "files", None)
        if files is None:
            files = [file["filename"] for file in getattr(source, "table").cache_files]  # noqa: B009
        known = [source.fingerprint(), *((os.path.abspath(file), *_status(file)) for file in files)]
    except (LookupError, OSError, ValueError):
        return ""
    return hashlib.blake2b(repr(known).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def _version_of_file(image: Any) -> str:
    try:
        return "{} bytes, {} ns".format(*_status(image))
    except (OSError, TypeError, ValueError):
        return ""


def _status(file: str) -> tuple[int, int]:
    """Size and time of change (ns) of a file. Raises `OSError`."""
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def _tar_member(file: str, status: tuple[int, int], offset: int, size: int) -> bytes:
    _require_same(file, status)
    return read_member(file, offset, size)


def _require_same(file: str, status: tuple[int, int]) -> None:
    if _status(file) != status:
        raise ValueError(f"{file} changed after its images were listed; run again when it is complete")


def is_shard(argument: str) -> bool:
    """Whether a name is that of a tar or parquet file."""
    return argument.lower().endswith(SHARD_SUFFIXES) and not os.path.isdir(argument)


def is_glob(argument: str) -> bool:
    """Whether an argument is a pattern such as `photos/**/*.jpg`, and not the name of a file that exists."""
    return has_magic(argument) and not os.path.lexists(argument)


def _fixed_folder(pattern: str) -> Path:
    """The folder that a glob starts from: what stands before its first part with a wildcard."""
    parts = Path(pattern).parts
    return Path(*parts[: next(place for place, part in enumerate(parts) if has_magic(part))])


def _matching_files(pattern: str, left_out: Counter[str]) -> Iterator[tuple[Path, str | None]]:
    """The images and shards of a glob, and what cannot be read, as `walk_images` yields them."""
    parts = Path(pattern).parts
    folder = _fixed_folder(pattern)
    fixed = len(folder.parts)
    place = parts.index("**") if "**" in parts else len(parts)
    for root, problem in _expand(folder, parts[fixed:place]):
        if problem is not None:
            yield root, problem
        elif place < len(parts) and root.is_dir():
            for path, reason in walk_images(root, others=SHARD_SUFFIXES):
                if reason is not None or _fits(path.relative_to(root).parts, parts[place:]):
                    yield path, reason
        elif place < len(parts):
            continue
        elif root.is_dir():
            left_out["folder"] += 1
        elif is_shard(str(root)) or is_image_file(root):
            yield root, None
        else:
            left_out[root.suffix.lower() or root.name] += 1


def _expand(folder: Path, parts: Sequence[str]) -> Iterator[tuple[Path, str | None]]:
    """The paths of a pattern's parts below a folder, in order, and the folders that cannot be listed."""
    if not parts:
        yield folder, None
        return
    if not has_magic(parts[0]):
        if os.path.lexists(folder / parts[0]):
            yield from _expand(folder / parts[0], parts[1:])
        return
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        yield folder, f"the folder cannot be listed: {error.strerror}"
        return
    for name in names:
        if fnmatchcase(name, parts[0]) and (not name.startswith(".") or parts[0].startswith(".")):
            yield from _expand(folder / name, parts[1:])


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path are those of a glob, in which `**` is any number of folders."""
    if not pattern or not parts:
        return not parts and all(part == "**" for part in pattern)
    if pattern[0] == "**":
        return _fits(parts, pattern[1:]) or _fits(parts[1:], pattern)
    return fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def _renamed(item: Input, name: str) -> Input:
    return item if item.name == name else replace(item, name=name)


def _lines_of_stdin() -> Iterator[str]:
    """The lines of standard input that are not empty, in the encoding of file names."""
    for line in sys.stdin.buffer:
        if text := os.fsdecode(line.rstrip(b"\r\n")):
            yield text
