"""Inputs of `vlv caption`, found while captions are written: folders, globs, lists, URLs, shards and data sets.

In memory are the first `LOOKAHEAD` inputs, about 100 bytes of each source where an image might be named twice, the
names in the folder that is searched, and those of the images in the tar file that is read. Several arguments with up
to `LISTED` images are listed first.
"""

import os
import sys
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from glob import has_magic
from itertools import chain, islice
from pathlib import Path

from vlv.errors import UserError
from vlv.image_files import is_image_file, is_url, walk_images

from .choices import TIME_LIMIT
from .dataset_rows import DatasetArguments, open_dataset, rows_of_dataset, stream_dataset
from .downloads import download
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
from .tables import LIST_SUFFIXES, SHARD_SUFFIXES, expand_tables, file_status, open_table

STDIN = "-"
LOOKAHEAD = 1000
"""Inputs that are found before the model is loaded."""
TEXT_SUFFIXES = (".txt", ".lst", ".list")
TEXT_BYTES = 4096
"""Bytes of a file of these suffixes among which an image has a zero."""
LISTED = 10_000
"""Several arguments with at most so many images are listed first, so that only names that clash get longer."""


class Inputs:
    """The inputs of a run, found one by one.

    `first` are found at once; `total` is their number if there are no others, else None. `count` finds all of them
    once more, to count them.

    Args:
        paths: Image files, folders, globs, URLs, parquet, tar and list files, or `-` for a list on standard input.
        dataset: A data set in their place.
        column: Of the images in parquet files and lists.
        url_timeout: Seconds that a download may take.
        quiet_suffixes: Of files that are not named among those that are left out.
        image_root: The folder that paths in parquet files and lists start from; by default that of the file.

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
        image_root: str | None = None,
    ):
        self._paths, self._dataset, self._column, self._timeout = list(paths), dataset, column, url_timeout
        self._quiet_suffixes, self._root = quiet_suffixes, image_root
        self.left_out: Counter[str] = Counter()
        self._length: int | None = None
        if dataset is None:
            for argument in paths:
                require_argument(argument)
            found = self._find(self.left_out)
            if len(paths) == 1 and paths[0].lower().endswith(".parquet"):
                with suppress(OSError, ValueError):  # a damaged file is a bad input
                    self._length = len(open_table(paths[0], column, file_status(paths[0]), image_root))
        elif dataset.streaming:
            found = stream_dataset(dataset, url_timeout)
        else:
            source = open_dataset(dataset)
            self._length = len(source)
            found = rows_of_dataset(dataset, source, url_timeout)
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
        """The inputs with names of their own: relative to the argument, or as given where names might clash.

        Images of a list that is the only argument are called by their path in it.
        """
        if len(self._paths) == 1:
            found = self._found_in(self._paths[0], left_out)
            if self._paths[0].lower().endswith(LIST_SUFFIXES) and os.path.isfile(self._paths[0]):
                yield from (renamed(item, item.member or item.name) for item, _ in found)
                return
            yield from (item for item, _ in (once(found) if self._paths[0] == STDIN else found))
            return
        found = once(named for argument in self._paths for named in self._found_in(argument, left_out))
        listed = [] if STDIN in self._paths else list(islice(found, LISTED + 1))
        if listed and len(listed) <= LISTED:
            yield from unique_names(listed)
            return
        for item, full in chain(listed, found):
            yield renamed(item, full)

    def _found_in(self, argument: str, left_out: Counter[str]) -> Iterator[Named]:
        found = _listed_on_stdin(self._timeout) if argument == STDIN else walk(argument, left_out, self._timeout)
        return expand_tables(found, self._column, self._timeout, left_out, self._root)


def require_argument(argument: str) -> None:
    """Raises `UserError` if an argument is a path that does not exist."""
    if not (argument == STDIN or is_url(argument) or is_glob(argument)):
        require_existing(argument)


def walk(argument: str, left_out: Counter[str], timeout: float = TIME_LIMIT) -> Iterator[Named]:
    """The images, and the files with many, that a path, a glob or a URL names. Files with many are not opened.

    Args:
        left_out: Counts what is neither, by suffix.
        timeout: Seconds that a download may take.

    Raises:
        UserError: If the path does not exist.
    """
    if is_url(argument):
        yield at_url(argument, timeout), argument
    elif is_glob(argument):
        folder = _fixed_folder(argument)
        for path, problem in _matching_files(argument, left_out):
            yield Input(path.relative_to(folder).as_posix(), path, problem=problem), path.as_posix()
    elif _is_text(argument):
        problem = (
            f"it is text, not an image; a list of paths is read from standard input: vlv caption - < {argument} "
            f"(or from a {', '.join(LIST_SUFFIXES)} file)"
        )
        yield Input(os.path.basename(argument), Path(argument), problem=problem), Path(argument).as_posix()
    else:
        yield from files_of(argument, left_out)


def _is_text(argument: str) -> bool:
    """Whether an argument is a text file, by its suffix and its beginning."""
    if not argument.lower().endswith(TEXT_SUFFIXES) or not os.path.isfile(argument):
        return False
    try:
        with open(argument, "rb") as file:
            return b"\0" not in file.read(TEXT_BYTES)
    except OSError:
        return False


def at_url(url: str, timeout: float) -> Input:
    """An image that is downloaded when it is read."""
    return Input(url, Path(), remote=url, read=partial(download, url, timeout))


def _listed_on_stdin(timeout: float) -> Iterator[Named]:
    """What the lines of standard input name. A path that does not exist is an input that cannot be read."""
    for line in _lines_of_stdin():
        try:
            found = [(at_url(line, timeout), line)] if is_url(line) else files_of(line)
            for item, _ in found:
                is_named = item.remote is not None or item.path == Path(line)
                name = line if is_named else os.path.join(line, item.name)
                yield renamed(item, name), name
        except UserError as error:
            yield Input(line, Path(line), problem=str(error)), line


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


def renamed(item: Input, name: str) -> Input:
    """The input with another name."""
    return item if item.name == name else replace(item, name=name)


def _lines_of_stdin() -> Iterator[str]:
    """The lines of standard input that are not blank, in the encoding of file names; without a byte order mark."""
    for number, line in enumerate(sys.stdin.buffer):
        text = os.fsdecode(line.removeprefix(BOM_UTF8) if number == 0 else line)
        if text.strip():
            yield text.removesuffix("\n").removesuffix("\r")
