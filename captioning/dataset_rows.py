"""The images of a data set, as the training reads it."""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import HTTPError

from vlv.errors import UserError, first_line

from .inputs import Input
from .tables import file_status, file_version, image_content, read_image

if TYPE_CHECKING:
    from vlv.train.data import Source

COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class DatasetArguments:
    """A data set, as the training reads it.

    Args:
        name: Folder, file, or `org/name` on the Hub.
        split: Split of a data set; None for `train`, or for all of a local folder that `vlv train` reads whole.
        column: Column of the images. Without one of the default name, other usual names are looked for.
        streaming: Whether its files are read while captions are written, and not downloaded first.
        revision: Branch, tag or commit on the Hub; None for `main`.
    """

    name: str
    split: str | None = None
    column: str = "image"
    streaming: bool = False
    revision: str | None = None

    @property
    def options(self) -> dict[str, str]:
        """Arguments of `datasets.load_dataset` besides the name and the split."""
        return {} if self.revision is None else {"revision": self.revision}


def open_dataset(dataset: DatasetArguments) -> "Source":
    """A data set that is not streamed. Raises `UserError` if it cannot be opened."""
    try:
        return _open(dataset)
    except (ValueError, OSError, HTTPError) as error:
        raise UserError(f"--dataset {dataset.name}: {error}") from error


def _open(dataset: DatasetArguments) -> "Source":
    """The split that is asked for.

    A local folder of images, tables or tar files has splits if the library `datasets` finds them; without a split
    that is asked for it is read whole.
    """
    from vlv.train.data.loading import find_dataset, open_source
    from vlv.train.data.tables import ColumnDataset

    folder, split = Path(dataset.name), dataset.split or "train"
    if dataset.revision is not None:
        table = find_dataset(dataset.name, split, revision=dataset.revision)
        return ColumnDataset(table, dataset.column, None, repository=dataset.name)
    if (folder / "dataset_dict.json").is_file():
        if not (folder / split).is_dir():
            known = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir()))
            raise ValueError(f"it has no split {split!r}; it has {known}")
        return open_source(str(folder / split), split, dataset.column, None, None, keeps_unreadable=True)
    if dataset.split is None or not folder.exists():
        return open_source(dataset.name, split, dataset.column, None, None, keeps_unreadable=True)
    if not folder.is_dir() or (folder / "state.json").is_file():
        raise ValueError(f"it has no splits; leave out --split {split}")
    return ColumnDataset(find_dataset(dataset.name, split), dataset.column, None, folder)


def rows_of_dataset(
    dataset: DatasetArguments,
    source: "Source",
    timeout: float,
    rows: Iterable[int] | None = None,
    first: int = 0,
    versions: bool = True,
) -> Iterator[Input]:
    """The rows of a data set: `SPLIT/ROW`.

    Args:
        timeout: Seconds that a download may take.
        rows: Their numbers; by default all.
        first: Number of the first row of `source` in the whole data set.
        versions: Whether the inputs have their `version`, which `--resume` compares.
    """
    from vlv.train.data.lists import ListDataset

    reader = _RowReader(source, timeout)
    of_files = versions and isinstance(source, ListDataset)
    version = dataset_version(source) if versions and not of_files else ""
    for row in range(len(source)) if rows is None else rows:
        own = file_version(source[row]["image"]) if of_files else version
        yield _named_row(dataset, first + row, partial(reader.read, row), own)


def stream_dataset(dataset: DatasetArguments, timeout: float) -> Iterator[Input]:
    """The rows of a streamed data set as they come.

    Raises:
        UserError: If it cannot be opened; while it is read, with the number of a row that cannot be read.
    """
    from vlv.train.data.loading import find_dataset

    try:
        stream = find_dataset(dataset.name, dataset.split or "train", streaming=True, **dataset.options)
    except (ValueError, OSError, HTTPError) as error:
        raise UserError(f"--dataset {dataset.name}: {error}") from error
    return _rows_of_stream(dataset, stream, timeout)


def _rows_of_stream(dataset: DatasetArguments, stream: Any, timeout: float) -> Iterator[Input]:
    from vlv.train.data import StreamSource

    is_folder = os.path.isdir(dataset.name)
    place = {"folder": dataset.name} if is_folder else {"repository": dataset.name}
    row = 0
    try:
        source = StreamSource(stream, dataset.name, dataset.column, None, **place)
    except ValueError as error:  # a column is missing
        raise UserError(f"--dataset {dataset.name}: {error}") from error

    reader = _RowReader(source, timeout)
    try:
        for row, content in enumerate(source.stream):
            yield _named_row(dataset, row, partial(reader.decode, content))
            row += 1
    except Exception as error:  # of the libraries for data sets, tables, images and downloads
        raise UserError(
            f"--dataset {dataset.name}: {dataset.split or 'train'}/{row} cannot be read: {first_line(error):.300}; "
            "the captions before it are written"
        ) from error


@dataclass(frozen=True)
class _RowReader:
    """Reads the rows of a data set in the process that has opened it, since its methods are not sent to others."""

    source: Any
    timeout: float

    def read(self, row: int) -> Any:
        return read_image(self.source, row, self.timeout)

    def decode(self, content: dict[str, Any]) -> Any:
        return image_content(self.source.image(content, self.source.name), self.timeout)


def _named_row(dataset: DatasetArguments, row: int, read: Callable[[], Any], version: str = "") -> Input:
    name = f"{dataset.split or 'train'}/{row}"
    remote = None if Path(dataset.name).exists() else f"hf://datasets/{dataset.name}#{name}"
    return Input(name, Path(dataset.name), member=name, read=read, remote=remote, version=version)


def dataset_version(source: "Source") -> str:
    """A hash of what is known of a data set without reading all of it; "" if that says nothing of its images."""
    try:
        if isinstance(source[0]["image"], str):  # images in files, which may change
            return ""
        files = getattr(source, "files", None)
        if files is None:
            files = [file["filename"] for file in getattr(source, "table").cache_files]  # noqa: B009
        known = [source.fingerprint(), *((os.path.abspath(file), *file_status(file)) for file in files)]
    except (LookupError, OSError, ValueError):
        return ""
    return hashlib.blake2b(repr(known).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def dataset_commit(source: "Source") -> str | None:
    """The commit on the Hub that a data set is of, by which the library `datasets` names its folder."""
    files = getattr(getattr(source, "table", None), "cache_files", ())
    return next(filter(COMMIT.fullmatch, (Path(file["filename"]).parent.name for file in files)), None)


def dataset_fingerprint(source: "Source") -> str:
    """A hash by which each machine tells a data set from others: of its rows, and of its commit on the Hub.

    Of a list, and of a folder of images, the names of all images count. Of others what their `fingerprint` reads.

    Raises:
        UserError: If a file cannot be read.
    """
    from vlv.train.data.lists import ListDataset

    if isinstance(source, ListDataset):
        root = f"{os.fspath(source.root)}/"
        known: Iterable[str] = (str(item["image"]).removeprefix(root) for item in source)
    else:
        try:
            known = [source.fingerprint(), dataset_commit(source) or ""]
        except (LookupError, OSError, ValueError) as error:
            raise UserError(f"the data set cannot be read: {error}") from error
    digest = hashlib.blake2b(digest_size=16)
    for text in known:
        digest.update(repr(text).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
