"""Results as lines: JSON lines, CSV, and parquet, which is made of lines at the end."""

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from vlv.errors import UserError
from vlv.files import errors_naming, to_json, write_atomically

from .output import GrowingFile, GrowingJson, output_path

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
METADATA = "metadata.jsonl"
"""In a folder of images: `datasets` reads the folder as a data set of images and captions."""
ROW_GROUP = 10_000


class GrowingJsonLines(GrowingFile):
    """A JSON object for each entry, on a line of its own: `{"name": ..., "caption": ...}`.

    Several captions are a list called `captions`. Each addition is complete on disk when `add` returns.

    Args:
        path: The file. `metadata.jsonl` calls the name `file_name`, as `datasets` does.
        entries: Entries to start with.
    """

    def __init__(self, path: Path, entries: Mapping[str, Any] | None = None):
        super().__init__(path, entries)
        self._name = "file_name" if path.name == METADATA else "name"

    def _lines(self, entries: Mapping[str, Any]) -> bytes:
        return b"".join(to_json({self._name: n} | _columns(entry), None) + b"\n" for n, entry in entries.items())


class GrowingCsv(GrowingFile):
    """A row for each entry: `name`, `caption`, and the other values of an object.

    Several captions are columns `caption_1`, `caption_2`, ... File names that are not UTF-8 keep their bytes.
    """

    def _lines(self, entries: Mapping[str, Any]) -> bytes:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
        for number, (name, entry) in enumerate(entries.items()):
            columns = _csv_columns(entry)
            if not (self._count or number):
                writer.writerow(["name", *columns])
            writer.writerow([name, *(json.dumps(v) if isinstance(v, bool) else v for v in columns.values())])
        return text.getvalue().encode("utf-8", "surrogateescape")


class GrowingParquet(GrowingJsonLines):
    """A parquet file, made at the end of a run of the lines beside it (`lines_path`), which are then removed.

    Columns are `name` and `caption`, or `captions` (lists), and the other values of an object. The file is complete
    whenever it is there. An interrupted run leaves the lines, which `--resume` reads.
    """

    def __init__(self, path: Path, entries: Mapping[str, Any] | None = None):
        self.parquet_path = path
        super().__init__(lines_path(path), entries)

    def close(self, tail: Mapping[str, Any] | None = None) -> None:
        super().close(tail)
        write_atomically(self.parquet_path, self._write_parquet)
        self.path.unlink()

    def _write_parquet(self, temporary: Path) -> None:
        import pyarrow
        from pyarrow import parquet

        rows = _rows_of_lines(self.path)
        first = list(islice(rows, ROW_GROUP))
        schema = pyarrow.schema([(column, _parquet_type(value)) for column, value in (first or [_NO_ROW])[0].items()])
        with parquet.ParquetWriter(temporary, schema) as writer:
            group = first
            while group:
                writer.write_table(pyarrow.Table.from_pylist([unicode_row(row) for row in group], schema))
                group = list(islice(rows, ROW_GROUP))


_NOT_UNICODE = re.compile(r"\\u(dc[89a-f][0-9a-f])")
_NO_ROW = {"name": "", "caption": ""}


def growing_file(path: Path, entries: Mapping[str, Any] | None = None) -> GrowingFile:
    """The file of a run's results, in the format of its suffix."""
    kinds: dict[str, type[GrowingFile]] = {
        ".json": GrowingJson,
        ".jsonl": GrowingJsonLines,
        ".csv": GrowingCsv,
        ".parquet": GrowingParquet,
    }
    return kinds[path.suffix.lower()](path, entries)


def caption_output(text: str, images: str | None) -> Path:
    """The file of `--output`: one of `SUFFIXES`, or `metadata.jsonl` of `DIR/`.

    Args:
        images: The argument of images, if there is one alone.

    Raises:
        UserError: If it cannot be written, or DIR is not the folder of the images.
    """
    if text.endswith(("/", os.sep)):
        if (
            images is None
            or not os.path.isdir(images)
            or not os.path.isdir(text)
            or not os.path.samefile(images, text)
        ):
            raise UserError(
                f"--output {text} is for a data set of the images in that folder, which has to be the only argument: "
                f"vlv caption {text} --output {text}"
            )
        return output_path(os.path.join(text, METADATA), ".jsonl")
    suffix = Path(text).suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"--output {text} must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if suffix == ".parquet":
        from vlv.train.data.tables import require_datasets

        require_datasets()
    return output_path(text, suffix)


def lines_path(output: Path) -> Path:
    """Where the results of a parquet file are until it is made."""
    return output.with_name(f"{output.name}.jsonl")


def results_path(output: Path) -> Path:
    """The file with the results of an earlier run, if there is one: of an interrupted run for parquet, its lines."""
    has_lines = output.suffix.lower() == ".parquet" and lines_path(output).exists()
    return lines_path(output) if has_lines else output


def has_results(output: Path) -> bool:
    """Whether there are results of an earlier run in an output."""
    return results_path(output).exists()


def read_lines(path: Path, option: str) -> dict[str, Any]:
    """`{name: result}` of a file that is not JSON. A last line that was cut off is left out.

    Args:
        option: The option that gave the path, for the message.

    Raises:
        UserError: If the file cannot be read, or has no names and captions.
    """
    suffix = path.suffix.lower()
    try:
        with errors_naming(path):
            if suffix == ".csv":
                rows = _rows_of_csv(path)
            elif suffix == ".parquet" and not lines_path(path).exists():
                rows = _rows_of_parquet(path)
            else:
                rows = _rows_of_lines(lines_path(path) if suffix == ".parquet" else path)
            return {row.pop("file_name" if "file_name" in row else "name"): _entry(row) for row in rows}
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be read: {error.strerror}") from error
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{option}: {path} does not hold names and captions, as `vlv caption` writes them ({error!r:.80})"
        ) from error


def _columns(entry: Any) -> dict[str, Any]:
    if isinstance(entry, dict):
        return entry
    return {"captions": entry} if isinstance(entry, list) else {"caption": entry}


def _entry(row: dict[str, Any]) -> Any:
    """A result of its columns."""
    if "captions" in row:
        return row["captions"]
    if "caption_1" in row:
        return [value for column, value in row.items() if column.startswith("caption_")]
    return row["caption"] if len(row) == 1 else {"caption": row.pop("caption"), **row}


def _csv_columns(entry: Any) -> dict[str, Any]:
    if isinstance(entry, list):
        return {f"caption_{number + 1}": text for number, text in enumerate(entry)}
    return _columns(entry)


def _rows_of_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                if line.endswith(b"\n"):
                    raise
                return
            if not isinstance(row, dict):
                raise ValueError(f"a line is {row!r:.40}, not an object")
            yield row


def _rows_of_csv(path: Path) -> Iterator[dict[str, Any]]:
    data = path.read_bytes()
    rows: list[list[str]] = []
    try:
        for row in csv.reader(io.StringIO(data.decode("utf-8", "surrogateescape"), newline=""), strict=True):
            rows.append(row)
        if not data.endswith(b"\n"):
            del rows[-1:]
    except csv.Error as error:
        if str(error) != "unexpected end of data":  # of a text in quotation marks: the last row was cut off
            raise ValueError(f"row {len(rows) + 1} is not CSV: {error}") from error
    for cells in rows[1:]:
        if len(cells) != len(rows[0]):
            raise ValueError(f"a row has {len(cells)} values, and the first one {len(rows[0])}")
        values: dict[str, Any] = dict(zip(rows[0], cells, strict=True))
        if "score" in values:
            values["score"] = float(values["score"])
        if "confident" in values:
            values["confident"] = values["confident"] == "true"
        yield values


def _rows_of_parquet(path: Path) -> Iterator[dict[str, Any]]:
    from pyarrow import ArrowInvalid, parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(ROW_GROUP):
                for row in batch.to_pylist():
                    yield row | {"name": _NOT_UNICODE.sub(lambda code: chr(int(code[1], 16)), row["name"] or "")}
    except ArrowInvalid as error:
        raise ValueError(str(error)) from error


def _parquet_type(value: Any) -> Any:
    import pyarrow

    types = {bool: pyarrow.bool_(), float: pyarrow.float64(), int: pyarrow.float64()}
    return pyarrow.list_(pyarrow.string()) if isinstance(value, list) else types.get(type(value), pyarrow.string())


def unicode_row(row: dict[str, Any]) -> dict[str, Any]:
    """The row with a name that parquet can hold: bytes that are not UTF-8 are escaped, such as `\\udce9`."""
    return row | {"name": row["name"].encode("utf-8", "backslashreplace").decode("utf-8")}
