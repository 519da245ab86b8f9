"""Tables of images and captions: parquet files, whose row groups are read when they are needed, and `datasets`."""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from vlv.image_files import is_url

from .captions import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    UNKNOWN,
    count_alternatives,
    find_column,
    find_prompt_column,
    require_text,
)
from .paths import named_image, resolve_path
from .source import MAX_STREAMS, EncodedImage, Source, hash_files
from .stored import count_by_file

logger = logging.get_logger(__name__)

MEMORY_FOR_ROW_GROUPS = 2**30
"""Bytes of decoded row groups that a process of the data loader keeps."""


def require_datasets() -> None:
    """Raises `ImportError` with a remedy if `datasets`, which brings pyarrow, is not installed."""
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "reading data sets and parquet needs the extra vlv[train] (pip install '.[train]' in its source folder)"
        ) from error


def parquet_columns(file: str | os.PathLike) -> list[str]:
    """The names of the columns of a parquet file.

    Raises:
        ValueError: If it does not exist or cannot be read; the message names it.
    """
    require_datasets()
    from pyarrow import ArrowException, parquet

    if not os.path.exists(file):
        raise ValueError(f"{file} does not exist")
    try:
        return list(parquet.read_schema(file).names)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read as parquet: {error}") from error


class ParquetSource(Source):
    """Parquet files with an image column: encoded images, paths, or arrays. Row groups are read when needed.

    Args:
        root: The folder that relative image paths start from; by default that of the file they stand in.

    Raises:
        ValueError: If a file cannot be read, or lacks a column.
    """

    def __init__(
        self,
        files: Sequence[str | os.PathLike],
        image_column: str,
        caption_column: str | None,
        root: str | os.PathLike | None = None,
        prompt_column: str | None = None,
    ):
        from pyarrow import parquet

        self.files, self.root = [str(file) for file in files], root
        self.columns: list[dict[str, str]] = []  # of each file
        groups: list[tuple[int, int, int, int]] = []  # file, group, rows, bytes
        known: dict[tuple[str, ...], dict[str, str]] = {}  # columns by all columns' names: each is said once
        for number, file in enumerate(self.files):
            names = tuple(parquet_columns(file))
            if names not in known:
                columns = {"image": find_column(names, image_column, IMAGE_COLUMNS, file)}
                if caption_column is not None:
                    columns["caption"] = find_column(names, caption_column, CAPTION_COLUMNS, file)
                if prompt := find_prompt_column(names, prompt_column, columns.get("caption"), file):
                    require_text(parquet.read_schema(file).field(prompt).type, prompt, file)
                    columns["prompt"] = prompt
                known[names] = columns
            columns = known[names]
            self.columns.append(columns)
            metadata = parquet.read_metadata(file)
            wanted = tuple(columns.values())
            for index in range(metadata.num_row_groups):
                group = metadata.row_group(index)
                chunks = [group.column(i) for i in range(group.num_columns)]
                size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] in wanted)
                groups.append((number, index, group.num_rows, size))
        self.has_captions = caption_column is not None
        self.has_prompts = any("prompt" in columns for columns in self.columns)
        table = np.array([group for group in groups if group[2]], dtype=np.int64).reshape(-1, 4)
        self._groups, self._ends = table, np.cumsum(table[:, 2])
        largest = int(table[:, 3].max(initial=1))
        self.num_streams = int(np.clip(MEMORY_FOR_ROW_GROUPS // max(largest, 1), 1, MAX_STREAMS))
        # Row groups in memory, or the errors of those that cannot be read, and their sizes.
        self._tables: OrderedDict[int, tuple[Any, int]] = OrderedDict()
        self._texts: dict[str, tuple[int, list[Any]]] = {}  # of the captions and instructions read last, their group
        if len(self):
            self._refuse_urls()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getstate__(self):
        return self.__dict__ | {"_tables": OrderedDict()}

    def shard_sizes(self) -> Sequence[int]:
        return self._groups[:, 2].tolist()

    def name(self, number: int) -> str:
        file, row = self._locate(number)
        return f"{self.files[file]}, row {row}"

    def _locate(self, number: int) -> tuple[int, int]:
        """The file of a row, and its number in that file."""
        file = int(self._groups[np.searchsorted(self._ends, number, side="right"), 0])
        before = self._ends[self._groups[:, 0] < file]
        return file, number - (int(before[-1]) if len(before) else 0)

    def _table(self, group: int) -> Any:
        if group in self._tables:
            self._tables.move_to_end(group)
            table = self._tables[group][0]
            if isinstance(table, str):
                raise ValueError(table)
            return table
        file, index, _, _ = self._groups[group]
        try:
            table = self._read(int(file), int(index), list(dict.fromkeys(self.columns[file].values())))
        except ValueError as error:
            self._tables[group] = (str(error), 0)
            raise
        self._tables[group] = (table, table.nbytes)
        while len(self._tables) > 1 and sum(size for _, size in self._tables.values()) > MEMORY_FOR_ROW_GROUPS:
            self._tables.popitem(last=False)
        while len(self._tables) > MAX_STREAMS:
            self._tables.popitem(last=False)
        return table

    def _read(self, file: int, index: int, columns: list[str]) -> Any:
        """Columns of a row group. Raises `ValueError` with the name of the file if they cannot be read."""
        from pyarrow import ArrowException, parquet

        try:
            with parquet.ParquetFile(self.files[file]) as content:
                return content.read_row_group(index, columns=columns, use_threads=False)
        except (ArrowException, OSError) as error:
            raise ValueError(f"{self.files[file]}, row group {index} cannot be read: {str(error).strip()}") from error

    def __getitem__(self, number: int) -> dict[str, Any]:
        group = int(np.searchsorted(self._ends, number, side="right"))
        table, file = self._table(group), int(self._groups[group, 0])
        row = number - int(self._ends[group] - self._groups[group, 2])
        column = table.column(self.columns[file]["image"])
        item = {"image": self._image(column[row].as_py(), column.type, file, number)}
        if self.has_captions:
            item["caption"] = table.column(self.columns[file]["caption"])[row].as_py()
        if "prompt" in self.columns[file]:
            item["prompt"] = table.column(self.columns[file]["prompt"])[row].as_py()
        return item

    def _image(self, value: Any, kind: Any, file: int, number: int) -> Any:
        if isinstance(value, dict):  # as `datasets` stores images
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return EncodedImage.named(value, self.name(number))
        if isinstance(value, str):
            return resolve_path(value, self.root if self.root is not None else os.path.dirname(self.files[file]))
        return np.asarray(value, dtype=_array_dtype(kind)) if isinstance(value, list) else value

    def caption(self, number: int) -> Any:
        return self._text("caption", number)

    def prompt(self, number: int) -> Any:
        return self._text("prompt", number)

    def _text(self, kind: str, number: int) -> Any:
        """The caption or the instruction of a row, read without its image; None where the file has no such column."""
        group = int(np.searchsorted(self._ends, number, side="right"))
        file, index = int(self._groups[group, 0]), int(self._groups[group, 1])
        if kind not in self.columns[file]:
            return None
        if self._texts.get(kind, (-1, []))[0] != group:
            column = self._read(file, index, [self.columns[file][kind]]).column(0)
            self._texts[kind] = (group, column.to_pylist())
        return self._texts[kind][1][number - int(self._ends[group] - self._groups[group, 2])]

    def _refuse_urls(self) -> None:
        """Raises `ValueError` if the first image that is text is a URL."""
        from pyarrow import parquet, types

        file, index = (int(value) for value in self._groups[0, :2])
        column = self.columns[file]["image"]
        kind = parquet.read_schema(self.files[file]).field(column).type
        if not (types.is_string(kind) or types.is_large_string(kind)):
            return
        try:
            images = self._read(file, index, [column]).column(0).to_pylist()
        except ValueError:  # its rows count as unreadable
            return
        row = next((row for row, image in enumerate(images) if image), None)
        if row is not None and is_url(images[row]):
            raise ValueError(
                f"{self.name(row)}: {images[row]:.80} is a URL; download the images first (for example with "
                "img2dataset)"
            )

    def count_captions(self) -> np.ndarray:
        columns = sorted({columns["caption"] for columns in self.columns})
        return count_by_file(self.files, f"captions {' '.join(columns)}", self._count)

    def _count(self, file: int) -> list[int]:
        column = self.columns[file]["caption"]
        counts: list[int] = []
        for _, index, rows, _ in self._groups[self._groups[:, 0] == file]:
            try:
                counts += map(count_alternatives, self._read(file, int(index), [column]).column(0).to_pylist())
            except ValueError as error:
                logger.warning(f"{error}; its {rows} rows count as unreadable")
                counts += [UNKNOWN] * int(rows)
        return counts

    def fingerprint(self) -> str:
        """A hash of the files' names and sizes, and of their footers: schema, sizes and statistics of all columns."""
        return hash_files(self.files, [_footer_hash(file) for file in self.files])


def _footer_hash(file: str) -> str:
    with open(file, "rb") as content:
        content.seek(-8, os.SEEK_END)
        length = int.from_bytes(content.read(4), "little")
        content.seek(-8 - length, os.SEEK_END)
        return hashlib.sha256(content.read(length)).hexdigest()


def _array_dtype(kind: Any) -> str:
    """The numpy name of the values in nested lists, or in an array of `datasets`."""
    while hasattr(kind, "value_type"):
        kind = kind.value_type
    return kind if isinstance(kind, str) else str(np.dtype(kind.to_pandas_dtype()))


class ColumnDataset(Source):
    """A `datasets.Dataset` with its columns renamed to `image` and `caption`. Images stay encoded.

    Args:
        folder: The folder that relative image paths start from; by default the working directory.
        repository: `org/name` on the Hub that the table comes from, which bounds the images that it may name.

    Raises:
        ValueError: If the table has no column of a given name.
    """

    def __init__(
        self,
        table: Any,
        image_column: str,
        caption_column: str | None,
        folder: str | os.PathLike | None = None,
        repository: str | None = None,
        prompt_column: str | None = None,
    ):
        names, where = table.column_names, repository or "the data"
        columns = {"image": find_column(names, image_column, IMAGE_COLUMNS, where)}
        if caption_column is not None:
            columns["caption"] = find_column(names, caption_column, CAPTION_COLUMNS, where)
        if prompt := find_prompt_column(names, prompt_column, columns.get("caption"), where):
            require_text(table.features.arrow_schema.field(prompt).type, prompt, where)
            columns["prompt"] = prompt
        from datasets import Image

        table = table.select_columns(list(dict.fromkeys(columns.values())))
        if isinstance(table.features[columns["image"]], Image):
            table = table.cast_column(columns["image"], Image(decode=False))
        self.table, self.columns, self.folder, self.repository = table, columns, folder, repository
        self.has_captions, self.has_prompts = caption_column is not None, "prompt" in columns
        self.array_dtype = getattr(table.features[columns["image"]], "dtype", "uint8")

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, number: int) -> dict[str, Any]:
        from pyarrow import ArrowException

        try:
            row = self.table[number]
        except ArrowException as error:
            raise ValueError(f"{self.name(number)} cannot be read: {error}") from error
        item = {name: row[column] for name, column in self.columns.items()}
        image = item["image"]
        if isinstance(image, dict):  # an encoded image
            image = image.get("bytes") or image["path"]
        if isinstance(image, bytes):
            image = EncodedImage.named(image, self.name(number))
        elif isinstance(image, str):
            image = named_image(image, self.folder, self.repository)
        elif isinstance(image, list):  # an Array3D feature
            image = np.asarray(image, dtype=self.array_dtype)
        return item | {"image": image}

    def count_captions(self) -> np.ndarray:
        captions = self.table.select_columns([self.columns["caption"]])
        counts = [count_alternatives(v) for batch in captions.iter(1000) for v in batch[self.columns["caption"]]]
        return np.array(counts, dtype=np.int32)

    def fingerprint(self) -> str:
        """A hash of the columns, all texts, the sizes of all images and up to 64 images, apart from files' folders."""
        digest = hashlib.sha256(repr((len(self), str(self.table.features))).encode())
        for batch in self.table.with_format("arrow").iter(10_000):
            for column in batch.columns:
                digest.update(_texts_or_sizes(column))
        for number in np.unique(np.linspace(0, max(len(self.table) - 1, 0), 64).astype(int)):
            row = self.table[int(number)]
            if isinstance(row[self.columns["image"]], dict):
                image = row[self.columns["image"]]
                row |= {self.columns["image"]: image["bytes"] or os.path.basename(image["path"] or "")}
            digest.update(repr(row).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def _texts_or_sizes(column: Any) -> bytes:
    """What tells rows apart and is read fast: texts, and names and sizes of encoded images; nothing of arrays."""
    import pyarrow as pa
    from pyarrow import compute

    if pa.types.is_struct(column.type):  # an image
        names = [os.path.basename(path or "") for path in compute.struct_field(column, "path").to_pylist()]
        sizes = compute.binary_length(compute.struct_field(column, "bytes")).to_pylist()
        return repr((names, sizes)).encode("utf-8", "surrogateescape")
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        return repr(compute.binary_length(column).to_pylist()).encode()
    kind = column.type.value_type if pa.types.is_list(column.type) else column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return repr(column.to_pylist()).encode("utf-8", "surrogateescape")
    return b""


KEY_COLUMN = "key"
KEY_SUFFIXES = (".jpg", ".png", ".webp")


def has_keys(file: str | os.PathLike) -> bool:
    """Whether a parquet file is a downloader's metadata of images such as `0/KEY.jpg` beside `0.parquet`."""
    names = parquet_columns(file)
    return KEY_COLUMN in names and not set(IMAGE_COLUMNS) & set(names) and Path(file).with_suffix("").is_dir()


def read_keys(
    file: str | os.PathLike, caption_column: str | None, prompt_column: str | None = None
) -> list[dict[str, Any]]:
    """The images, and captions, of a downloader's metadata. Says how many rows have no image: failed downloads."""
    from pyarrow import parquet

    names, folder = parquet_columns(file), Path(file).with_suffix("")
    columns: dict[str, str] = {}
    if caption_column is not None:
        columns["caption"] = find_column(names, caption_column, CAPTION_COLUMNS, str(file))
    if prompt := find_prompt_column(names, prompt_column, columns.get("caption"), str(file)):
        require_text(parquet.read_schema(file).field(prompt).type, prompt, str(file))
        columns["prompt"] = prompt
    items: list[dict[str, Any]] = []
    rows = parquet.read_table(file, columns=[KEY_COLUMN, *columns.values()]).to_pylist()
    for row in rows:
        images = (folder / f"{row[KEY_COLUMN]}{suffix}" for suffix in KEY_SUFFIXES)
        image = next((image for image in images if image.is_file()), None)
        if image is not None:
            items.append({"image": str(image)} | {name: row[column] for name, column in columns.items()})
    if len(items) < len(rows):
        logger.warning(f"{file}: {len(rows) - len(items)} of {len(rows)} rows have no image in {folder}")
    return items
