"""Finds what a setting names: a folder, list files, parquet files, tar files, or a data set."""

import os
from collections.abc import Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers.utils import logging

from vlv.image_files import walk_images

from .captions import CAPTION_COLUMN, IMAGE_COLUMN, IMAGE_COLUMNS, PROMPT_COLUMN
from .held_back import hold_back
from .lists import LIST_SUFFIXES, ListDataset, image_files, lists_of_a_folder, read_folder, read_list
from .mixture import TrainingDataset
from .shards import TarSource
from .source import Source
from .streaming import StreamingDataset, StreamSource
from .tables import ColumnDataset, ParquetSource, has_keys, parquet_columns, read_keys, require_datasets

logger = logging.get_logger(__name__)

KINDS = "a folder, a list (.jsonl, .json, .csv, .tsv), parquet or tar files, or a data set of the Hub such as org/name"
STREAMED_SUFFIXES = (".parquet", ".tar", ".zip")
Weighted = tuple[str, float]


def load_images(source: Any, *, split: str = "train", image_column: str = IMAGE_COLUMN, **options) -> TrainingDataset:
    """Images without captions, for stage 1. Items are `{"image": ...}`.

    Args:
        source: What names the images, or several of them: see `parse_sources`. Each is a folder of images (searched
            recursively), a list file, a parquet or tar file, a folder or glob of such files, or a data set that
            `datasets.load_dataset` finds.
        split: Split of a data set.
        image_column: Column of a table. Without a column of the default name, other usual names are looked for.
        options: `image_root`, `streaming` (True for a [`StreamingDataset`], for which weights are shares of the
            samples), `eval_share` (that share of each source's rows, drawn by seed, is in `held_back` instead), and
            options of [`TrainingDataset`].

    Raises:
        ImportError: If reading `source` needs the library `datasets` and it is not installed.
        ValueError: If nothing is found; the message says what was looked for.
    """
    return _load(source, split, image_column, None, **options)


def load_pairs(
    source: Any,
    *,
    split: str = "train",
    image_column: str = IMAGE_COLUMN,
    caption_column: str = CAPTION_COLUMN,
    prompt_column: str | None = PROMPT_COLUMN,
    **options,
) -> TrainingDataset:
    """Image-caption pairs, for stage 2. Items are `{"image": ..., "caption": str, "prompt": instruction}`.

    Args:
        source: As for `load_images`. A folder of images has either a `.txt` or `.caption` file beside each image, or
            `.jsonl` files or a `metadata.csv` that name images within the folder.
        split: Split of a data set.
        image_column, caption_column: Columns of a table, and keys in lists. Without a column of the default name,
            other usual names are looked for.
        prompt_column: Column, or key, of instructions: what the model reads before a caption. The default name may be
            absent; None or "" reads none.
        options: As for `load_images`.

    Raises:
        ImportError: If reading `source` needs the library `datasets` and it is not installed.
        ValueError: If nothing is found, an image has no caption, or a listed image does not exist; the message names
            the file.
    """
    return _load(source, split, image_column, caption_column, prompt_column=prompt_column, **options)


def _load(
    source: Any,
    split: str,
    image_column: str,
    caption_column: str | None,
    image_root: str | os.PathLike | None = None,
    streaming: bool = False,
    eval_share: float = 0.0,
    prompt_column: str | None = None,
    **options,
) -> Any:
    named = parse_sources(source)
    if streaming and eval_share:
        raise ValueError("eval_share does not work with streaming; give evaluation data of its own")
    if streaming:
        return _open_stream(named, split, image_column, caption_column, image_root, prompt_column, **options)
    options.pop("shuffle", None)
    lines = options.get("caption_lines", "first")
    columns = (split, image_column, caption_column, image_root, lines, prompt_column)
    sources = [open_source(name, *columns) for name, _ in named]
    weights = [weight for _, weight in named]
    if not eval_share:
        return TrainingDataset(sources, weights, **options)
    pairs = [hold_back(each, eval_share, options.get("seed", 0), 5, i) for i, each in enumerate(sources)]
    training, held_back = zip(*pairs, strict=True)
    dataset = TrainingDataset(training, weights, **options)
    plain = {"random_crop": False, "horizontal_flip": False}
    dataset.held_back = TrainingDataset(held_back, **{**options, **plain})
    return dataset


def _open_stream(
    named: Sequence[Weighted],
    split: str,
    image_column: str,
    caption_column: str | None,
    image_root: str | os.PathLike | None,
    prompt_column: str | None,
    on_bad_caption: str = "skip",
    **options,
) -> StreamingDataset:
    """Streams, mixed with sources that are lists, globs, single files or folders of images.

    Raises:
        ValueError: For what a stream cannot do, or if no source is a stream.
    """
    if image_root is not None:
        raise ValueError("image_root is not possible with streaming; give it without --streaming")
    if on_bad_caption != "skip":
        raise ValueError(
            "on_bad_caption 'error' is not possible with streaming, which reads captions while training; "
            "--max_bad_share 0 stops the run at the first"
        )
    if not any(_can_stream(source) for source, _ in named):
        which = f"{named[0][0]} cannot be" if len(named) == 1 else "none of the sources can be"
        raise ValueError(
            f"{which} read with streaming, which takes a data set of the Hub such as org/name, or a folder "
            "of parquet or tar files; list, parquet and tar files given by name are read without --streaming, and so "
            "are folders of images"
        )
    sources: list[StreamSource | Source] = []
    for source, _ in named:
        if not _can_stream(source):
            lines = options.get("caption_lines", "first")
            sources.append(open_source(source, split, image_column, caption_column, None, lines, prompt_column))
            continue
        stream = find_dataset(source, split, streaming=True)
        place = {"folder": source} if os.path.isdir(source) else {"repository": source}
        sources.append(
            StreamSource(stream, source, image_column, caption_column, **place, prompt_column=prompt_column)
        )
    names, weights = zip(*named, strict=True)
    return StreamingDataset(sources, weights, names=names, **options)


def _can_stream(source: str) -> bool:
    """Whether a source is a data set of the Hub, or a folder with files that `datasets` streams."""
    if os.path.isdir(source):
        folder = Path(source)
        return not _is_saved_dataset(folder) and any(_files(folder, suffix) for suffix in STREAMED_SUFFIXES)
    is_file = Path(source).suffix.lower() in (*LIST_SUFFIXES, *STREAMED_SUFFIXES) or os.path.isfile(source)
    return _matching(source) == [source] and not is_file


def parse_sources(value: Any) -> list[Weighted]:
    """Sources and their weights from a setting.

    Args:
        value: A source, or a list of sources. Each is text, `"SOURCE@WEIGHT"`, or `{"source": ..., "weight": ...}`.

    Raises:
        ValueError: If it is something else, or a weight is not a number above 0.
    """
    values = [value] if isinstance(value, str | os.PathLike | Mapping) else value
    if not isinstance(values, list | tuple) or not values:
        raise ValueError(f"a source is {value!r}; expected {KINDS}, or a list of such")
    return [_parse_source(entry) for entry in values]


def _parse_source(entry: Any) -> Weighted:
    if isinstance(entry, Mapping):
        unknown = set(entry) - {"source", "weight"}
        if unknown or "source" not in entry:
            raise ValueError(f"a source is {dict(entry)}; expected {{source: ..., weight: ...}}")
        name, weight = os.fspath(entry["source"]), entry.get("weight", 1)
    else:
        name, weight = os.fspath(entry), 1
        before, at, after = name.rpartition("@")
        if at and before and not os.path.exists(name):
            try:
                weight = float(after)
                name = before
            except ValueError:  # a name with an @
                pass
    try:
        number = float(weight)
    except (TypeError, ValueError):
        number = 0
    if not 0 < number < float("inf"):
        raise ValueError(f"the weight of {name} is {weight!r}; expected a number above 0: passes per epoch")
    return name, number


def describe_sources(value: Any) -> str | list[str]:
    """The sources of a setting as text, or as a list if there are several. A weight other than 1 follows an `@`."""
    names = [name if weight == 1 else f"{name}@{weight:g}" for name, weight in parse_sources(value)]
    return names[0] if len(names) == 1 else names


def open_source(
    source: str,
    split: str,
    image_column: str,
    caption_column: str | None,
    root: str | os.PathLike | None,
    caption_lines: str = "first",
    prompt_column: str | None = None,
    keeps_unreadable: bool = False,
) -> Source:
    """One source. Errors are those of `load_pairs`.

    Args:
        keeps_unreadable: Of lists, as of `read_list`.
    """
    files = _matching(source)
    suffix = Path(files[0]).suffix.lower()
    if len(files) == 1 and os.path.isdir(files[0]):
        columns = (image_column, caption_column, root, caption_lines, prompt_column)
        return _open_folder(Path(files[0]), *columns, keeps_unreadable)
    if suffix == ".parquet":
        return _parquet(files, image_column, caption_column, root, prompt_column)
    if not os.path.exists(files[0]):
        if suffix in (*LIST_SUFFIXES, ".tar"):
            raise ValueError(f"{source} does not exist; give {KINDS}")
        return _open_dataset(source, split, image_column, caption_column, root, prompt_column)
    if suffix == ".tar":
        return TarSource(files, caption_column, caption_lines, prompt_column)
    if suffix in LIST_SUFFIXES:
        return _list(files, image_column, caption_column, root, source, prompt_column, keeps_unreadable)
    raise ValueError(f"{source} is neither {KINDS}")


def _matching(source: str) -> list[str]:
    """The files that a glob names, or the source itself."""
    found = (
        sorted(glob(source, recursive=True)) if any(c in source for c in "*?[") and not os.path.exists(source) else []
    )
    return found or [source]


def _open_folder(
    folder: Path,
    image_column: str,
    caption_column: str | None,
    root: str | os.PathLike | None,
    caption_lines: str,
    prompt_column: str | None,
    keeps_unreadable: bool,
) -> Source:
    if _is_saved_dataset(folder):
        return ColumnDataset(_saved_dataset(folder), image_column, caption_column, root, prompt_column=prompt_column)
    tars, parquets = _files(folder, ".tar"), _files(folder, ".parquet")
    if parquets and not tars and is_metadata(parquets[0], image_column, folder):
        logger.warning(f"{parquets[0]} has no column of images and is left out as a downloader's metadata")
        parquets = []
    if tars:
        if parquets:
            logger.info(f"{folder} has tar files, so that its parquet files are left out as a downloader's metadata")
        return TarSource(tars, caption_column, caption_lines, prompt_column)
    if parquets:
        return _parquet(parquets, image_column, caption_column, root, prompt_column)
    if caption_column is None:
        return ListDataset(({"image": str(path)} for path in image_files(folder)), folder)
    lists = lists_of_a_folder(folder)
    if lists:
        try:
            return _list(lists, image_column, caption_column, root, str(folder), prompt_column, keeps_unreadable)
        except _EmptyLists as error:
            raise ValueError(f"{error}; fill it, or remove it to read .txt files beside the images") from error
    return ListDataset(read_folder(folder, caption_lines), folder)


class _EmptyLists(ValueError):
    pass


def _list(
    files: Sequence[str | Path],
    image_column: str,
    caption_column: str | None,
    root: Any,
    source: str,
    prompt_column: str | None,
    keeps_unreadable: bool,
) -> Source:
    columns = (image_column, caption_column, root, prompt_column)
    items = (item for file in files for item in read_list(Path(file), *columns, keeps_unreadable))
    dataset = ListDataset(items, root or (source if os.path.isdir(source) else os.path.dirname(source) or "."))
    if not len(dataset):
        raise _EmptyLists(f"no {'pairs' if caption_column else 'images'} in {', '.join(map(str, files))}")
    return dataset


def _files(folder: Path, suffix: str) -> list[str]:
    """The files of a kind in all folders below one; hidden folders are left out."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(place, n) for n in names if n.lower().endswith(suffix) and not n.startswith(".")]
    return sorted(found)


def is_metadata(file: str, image_column: str, folder: Path) -> bool:
    """Whether a parquet file only describes the images that lie beside it."""
    names = parquet_columns(file)
    wanted = IMAGE_COLUMNS if image_column == IMAGE_COLUMN else (image_column,)
    return not any(name in names for name in wanted) and any(problem is None for _, problem in walk_images(folder))


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def _saved_dataset(folder: Path) -> Any:
    """A data set that `Dataset.save_to_disk` wrote."""
    require_datasets()
    import datasets

    return datasets.load_from_disk(folder)


def _parquet(
    files: Sequence[str],
    image_column: str,
    caption_column: str | None,
    root: str | os.PathLike | None,
    prompt_column: str | None,
) -> Source:
    require_datasets()
    if image_column == IMAGE_COLUMN and all(map(has_keys, files)):
        items = (item for file in files for item in read_keys(file, caption_column, prompt_column))
        return ListDataset(items, os.path.dirname(files[0]) or ".")
    return ParquetSource(files, image_column, caption_column, root, prompt_column)


def _open_dataset(
    source: str, split: str, image_column: str, caption_column: str | None, root: Any, prompt_column: str | None
) -> Source:
    table = find_dataset(source, split)
    return ColumnDataset(table, image_column, caption_column, root, repository=source, prompt_column=prompt_column)


def find_dataset(source: str, split: str, streaming: bool = False, **options) -> Any:
    """A data set of the library `datasets`. Raises `ValueError` with the name if it cannot be read.

    Args:
        options: More arguments of `datasets.load_dataset`, such as `revision`.
    """
    require_datasets()
    import datasets
    from pyarrow import ArrowException

    if not os.path.exists(source) and _is_path(source):
        raise ValueError(f"{source} does not exist; give {KINDS}")
    try:
        return datasets.load_dataset(source, split=split, streaming=streaming, **options)
    except (datasets.exceptions.DatasetsError, ArrowException) as error:
        raise ValueError(f"{source} cannot be read: {error.__cause__ or error}") from error


def _is_path(source: str) -> bool:
    """Whether a name cannot be that of a data set on the Hub, which is `org/name`, or begins with a local folder."""
    if source.startswith((".", "/", "~")) or source.count("/") != 1 or os.path.isdir(source.split("/")[0]):
        return True
    try:
        validate_repo_id(source)
    except HFValidationError:
        return True
    return False
