"""Inputs of `vlv caption`, found while captions are written: folders, globs, lists, URLs, shards and data sets.

Nothing but the first `LOOKAHEAD` inputs, and 16 bytes of each source where an image might be named twice, is kept in
memory.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from glob import has_magic, iglob
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlv.errors import UserError
from vlv.image_files import is_image_file, walk_images

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
LISTED = 10_000
"""Several arguments with at most so many images are listed first, so that only names that clash get longer."""


@dataclass(frozen=True)
class DatasetArguments:
    """A data set, as the training reads it.

    Args:
        name: Folder, file, or `org/name` on the Hub.
        split: Split of a data set.
        column: Column of the images. Without one of the default name, other usual names are looked for.
        streaming: Whether its files are read while captions are written, and not downloaded first.
    """

    name: str
    split: str = "train"
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
        self._open: Source | None = None
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
        self.total = len(self.first) if len(self.first) <= at_once else self._known_length()
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

    def _known_length(self) -> int | None:
        return None if self._open is None else len(self._open)

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
            yield from self._rows_of_shard(argument, Path(argument).name)
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
        found = self._rows_of_shard(line, path.name) if is_shard(line) else files_of(line)
        yield from ((_renamed(item, full), full) for item, full in found)

    def _at_url(self, url: str) -> Input:
        return Input(url, Path(), remote=url, read=partial(download, url, self._timeout))

    def _matching(self, pattern: str, left_out: Counter[str]) -> Iterator[Named]:
        """The images and shards that a glob names, called by their path in the folder that it starts from."""
        folder = _fixed_folder(pattern)
        for path, problem in _matching_files(pattern, left_out):
            name = path.relative_to(folder).as_posix()
            if problem is None and is_shard(str(path)):
                yield from self._rows_of_shard(str(path), name)
            else:
                yield Input(name, path, problem=problem), path.as_posix()

    def _rows_of_shard(self, file: str, name: str) -> Iterator[Named]:
        """The images of a tar or parquet file: `NAME/MEMBER` or `NAME/ROW`. A damaged file is one bad input."""
        from vlv.train.data import ParquetSource, TarSource

        source: Source
        try:
            if file.lower().endswith(".tar"):
                source = TarSource([file], None)
            else:
                source = ParquetSource([file], self._column, None)
        except (ValueError, OSError) as error:
            yield Input(name, Path(file), problem=str(error)), Path(file).as_posix()
            return
        if len(self._paths) == 1 and file == self._paths[0]:
            self._open = source
        for row in range(len(source)):
            member = source.name(row).removeprefix(f"{file}:") if isinstance(source, TarSource) else str(row)
            item = Input(f"{name}/{member}", Path(file), member=member, read=partial(self._row, source, row))
            yield item, f"{Path(file).as_posix()}/{member}"

    def _row(self, source: "Source", row: int) -> Any:
        return self._content(source[row]["image"])

    def _content(self, image: Any) -> Any:
        """The image of a row as an `Input` has it."""
        from vlv.train.data.source import UnreadableImage

        if isinstance(image, UnreadableImage):
            raise ValueError(image.reason)
        if image is None:
            raise ValueError("the row has no image")
        return download(image, self._timeout) if isinstance(image, str) and is_url(image) else image

    def _rows_of_dataset(self, dataset: DatasetArguments) -> Iterator[Input]:
        """The rows of a data set: `SPLIT/ROW`. Raises `UserError` if it cannot be opened."""
        from vlv.train.data.loading import find_dataset, open_source

        folder = Path(dataset.name)
        name = str(folder / dataset.split) if (folder / "dataset_dict.json").is_file() else dataset.name
        try:
            if dataset.streaming:
                stream = find_dataset(dataset.name, dataset.split, streaming=True)
                return self._rows_of_stream(dataset, stream)
            self._open = open_source(name, dataset.split, dataset.column, None, None)
        except (ValueError, OSError) as error:
            raise UserError(f"--dataset {dataset.name}: {error}") from error
        reads: Iterator[Callable[[], Any]] = (partial(self._row, self._open, row) for row in range(len(self._open)))
        return self._named_rows(dataset, reads)

    def _rows_of_stream(self, dataset: DatasetArguments, stream: Any) -> Iterator[Input]:
        from vlv.train.data import StreamSource

        is_folder = os.path.isdir(dataset.name)
        place = {"folder": dataset.name} if is_folder else {"repository": dataset.name}
        source = StreamSource(stream, dataset.name, dataset.column, None, **place)
        rows = (partial(self._content, source.image(row, dataset.name)) for row in source.stream)
        return self._named_rows(dataset, rows)

    def _named_rows(self, dataset: DatasetArguments, reads: Iterator[Callable[[], Any]]) -> Iterator[Input]:
        local = Path(dataset.name).exists()
        for row, read in enumerate(reads):
            name = f"{dataset.split}/{row}"
            remote = None if local else f"hf://datasets/{dataset.name}#{name}"
            yield Input(name, Path(dataset.name), member=name, read=read, remote=remote)


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
    if "**" not in parts:
        for path in map(Path, sorted(iglob(pattern))):
            if path.is_dir():
                continue
            if is_shard(str(path)) or is_image_file(path):
                yield path, None
            else:
                left_out[path.suffix.lower() or path.name] += 1
        return
    place = parts.index("**")
    for root in map(Path, sorted(iglob(str(Path(*parts[:place]))))):
        for path, problem in walk_images(root, others=SHARD_SUFFIXES):
            if problem is not None or _fits(path.relative_to(root).parts, parts[place:]):
                yield path, problem


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
