"""Parquet files as a stream: batches in, row groups of one size out, with constant memory."""

import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from .rules import COLUMNS

ROWS = 65536
"""Rows of a batch, and of a row group that is written."""
INSTALL = "needs pyarrow, which the extra vlv[data] brings (pip install '.[data]' in the source folder of vlv)"


def require_pyarrow() -> None:
    """Raises `ImportError` with a remedy if pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ImportError(f"reading and writing parquet {INSTALL}") from error


def unified_schema(files: Sequence[str]) -> Any:
    """A schema that the rows of all files fit into: all columns, and the wider of two types.

    Raises:
        ValueError: If a file cannot be read as parquet or has two columns of one name, or if two types of a column do
            not go together.
    """
    import pyarrow as pa
    from pyarrow import parquet

    schema = None
    for file in files:
        try:
            own = parquet.read_schema(file).remove_metadata()
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{file} cannot be read as parquet: {error}") from error
        repeated = [name for name, count in Counter(own.names).items() if count > 1]
        if repeated:
            raise ValueError(f"{file} has more than one column {repeated[0]!r}; rename or remove one in the file")
        try:
            schema = own if schema is None else pa.unify_schemas([schema, own], promote_options="permissive")
        except pa.ArrowException as error:
            raise ValueError(f"{file} has other types of columns than {files[0]}: {error}") from error
    return schema


def require_columns(files: Sequence[str], names: Mapping[str, str], needed: Collection[str]) -> None:
    """Refuses files that have a column under another name than others, whose rows would count as empty.

    Args:
        names: The columns, by what they hold.
        needed: Of what they hold, what no file may lack.

    Raises:
        ValueError: With the name of the file.
    """
    from pyarrow import parquet

    for file in files:
        present = parquet.read_schema(file).names
        for kind, name in names.items():
            other = next((other for other in COLUMNS.get(kind, ()) if other in present), None)
            if name not in present and (other is not None or kind in needed):
                has = f"it has {other!r} there" if other is not None else f"it has {', '.join(present)}"
                raise ValueError(
                    f"{file} has no column {name!r} for the {kind}, which other files have; {has}. Give files with "
                    "other columns to a command of their own"
                )


def count_rows(files: Sequence[str]) -> int:
    """The rows of all files."""
    from pyarrow import parquet

    return sum(parquet.read_metadata(file).num_rows for file in files)


def batches(
    files: Sequence[str], schema: Any, rows: int = ROWS, columns: Sequence[str] | None = None
) -> Iterator[Any]:
    """Tables of at most so many rows, with the columns of the schema in its order. A column that a file lacks is null.

    Args:
        columns: The only columns to read; by default all.

    Raises:
        ValueError: If a file is damaged; the message names it.
    """
    import pyarrow as pa
    from pyarrow import parquet

    wanted = pa.schema([schema.field(name) for name in (schema.names if columns is None else columns)])
    for file in files:
        try:
            with parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False) as content:
                present = [name for name in wanted.names if name in content.schema_arrow.names]
                for batch in content.iter_batches(rows, columns=present, use_threads=False):
                    arrays = [
                        batch.column(field.name).cast(field.type)
                        if field.name in present
                        else pa.nulls(batch.num_rows, field.type)
                        for field in wanted
                    ]
                    yield pa.Table.from_arrays(arrays, schema=wanted)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{os.fspath(file)} cannot be read: {str(error).strip()}") from error


class TableWriter:
    """Writes a parquet file in row groups of `ROWS` rows, however the rows come.

    Attributes:
        rows: Number of rows that were written.
    """

    def __init__(self, path: str | os.PathLike, schema: Any, group_rows: int = ROWS):
        from pyarrow import parquet

        self.rows, self.schema, self.group_rows = 0, schema, group_rows
        self._waiting: list[Any] = []
        self._count = 0
        self._writer = parquet.ParquetWriter(path, schema, compression="zstd")

    def write(self, table: Any) -> None:
        """Adds the rows of a table of this schema."""
        if not table.num_rows:
            return
        self.rows += table.num_rows
        self._waiting.append(table)
        self._count += table.num_rows
        while self._count >= self.group_rows:
            self._write_group(self.group_rows)

    def _write_group(self, rows: int) -> None:
        import pyarrow as pa

        table = pa.concat_tables(self._waiting)
        self._writer.write_table(table.slice(0, rows).combine_chunks(), row_group_size=self.group_rows)
        rest = table.slice(rows)
        self._waiting, self._count = ([rest] if rest.num_rows else []), rest.num_rows

    def __enter__(self) -> "TableWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None and self._count:
                self._write_group(self._count)
        finally:
            self._writer.close()
