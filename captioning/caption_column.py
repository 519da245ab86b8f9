"""A column of captions beside the other columns of a data set, for the parquet files of a pushed data set."""

import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
from datasets import Dataset, DatasetInfo, Features, Image, concatenate_datasets
from datasets.table import InMemoryTable

from vlv.errors import UserError, first_line
from vlv.train.data.tables import ColumnDataset

ROWS_OF_A_CHUNK = 20
"""Images of at most `SIZE_LIMIT` that are one array: arrow's arrays end at 2 GiB."""


def to_dataset(name: str, rows: list[dict[str, Any]], features: Features) -> Dataset:
    """Rows as a data set. Raises `UserError` if they have other types than the columns."""
    starts = range(0, len(rows), ROWS_OF_A_CHUNK)
    try:
        return concatenate_datasets(
            [Dataset.from_list(rows[start : start + ROWS_OF_A_CHUNK], features=features) for start in starts]
        )
    except (ValueError, TypeError) as error:  # of pyarrow, too
        raise UserError(f"{name} has rows of other types than its first: {first_line(error):.300}") from error


def with_captions(shard: Dataset, repository: str, column: str, captions: list[Any], feature: Any) -> Dataset:
    """A shard with a column of captions and with the content of its images, as a parquet file needs it."""
    table = shard.with_format("arrow")[:]
    for number, (name, kind) in enumerate(shard.features.items()):
        if isinstance(kind, Image):
            images = with_content(shard, name, table.column(name), repository)
            table = table.set_column(number, name, images)
    features = Features({**shard.features, column: feature})
    table = table.append_column(column, pyarrow.array(captions, features.arrow_schema.field(column).type))
    return Dataset(InMemoryTable(table.cast(features.arrow_schema)), info=DatasetInfo(features=features))


def with_content(shard: Dataset, name: str, column: pyarrow.ChunkedArray, repository: str) -> pyarrow.ChunkedArray:
    """A column of images with the bytes of those that are files; null for one that cannot be read.

    Files are read as `vlv caption` reads them: those of the data set alone, and no others of this machine.
    """
    is_file = pyarrow.compute.is_null(pyarrow.compute.struct_field(column, "bytes"))
    if not pyarrow.compute.any(pyarrow.compute.and_(is_file, column.is_valid())).as_py():
        return column
    source, images = ColumnDataset(shard, name, None, repository=repository), []
    for row, value in enumerate(column.to_pylist()):
        try:
            image = source[row]["image"]
            if isinstance(image, str) and os.path.isfile(image):
                image = Path(image).read_bytes()
        except (OSError, ValueError):
            image = None
        path = os.path.basename((value or {}).get("path") or "")
        images.append({"bytes": image, "path": path or None} if isinstance(image, bytes) else None)
    starts = range(0, len(images), ROWS_OF_A_CHUNK)
    return pyarrow.chunked_array(
        [pyarrow.array(images[start : start + ROWS_OF_A_CHUNK], column.type) for start in starts], column.type
    )
