"""One file of the captions of all shards, written with constant memory."""

import json
import os
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

from vlv.errors import UserError
from vlv.files import to_json, write_atomically

from .shards import ShardFolder

SUFFIXES = (".json", ".jsonl", ".parquet")
ROWS_PER_GROUP = 10_000
"""Of a parquet file."""


def merge(shards: ShardFolder, output: Path) -> dict[str, int]:
    """Writes the captions of all shards into one file, in the order of the shards.

    `.json` is `{name: caption}`, without the images that failed. `.jsonl` and `.parquet` have all rows: `name`,
    `caption` or `captions`, and `error`.

    Returns:
        The numbers of images that are `captioned` and `failed`.

    Raises:
        UserError: If a shard is missing or damaged, or two images have one name.
    """
    if missing := shards.missing():
        names = ", ".join(shards.path(index).name for index in missing[:5])
        raise UserError(
            f"{shards.folder} lacks {len(missing)} of {shards.count} shards: {names}"
            f"{', ...' if len(missing) > 5 else ''}; run `vlv caption` with the same arguments again"
        )
    counts = {"captioned": 0, "failed": 0}
    write = {".json": _write_json, ".jsonl": _write_jsonl, ".parquet": _write_parquet}[output.suffix.lower()]
    several = int(shards.run["settings"].get("num_captions", 1)) > 1
    with tempfile.TemporaryDirectory(dir=_folder_of(output), prefix=".names-") as folder:
        rows = _unique(_rows(shards, counts), Path(folder, "names.sqlite"))
        write_atomically(output, lambda temporary: write(temporary, rows, several))
    return counts


def _folder_of(output: Path) -> Path:
    output.parent.mkdir(parents=True, exist_ok=True)
    return output.parent


def _rows(shards: ShardFolder, counts: dict[str, int]) -> Iterator[dict[str, Any]]:
    """The lines of all shards; counts them. Raises `UserError` if a shard has others than its manifest says."""
    for index in range(shards.count):
        path, found = shards.path(index), {"captioned": 0, "failed": 0}
        expected = shards.counts(index)
        try:
            with open(path, encoding="utf-8", newline="\n") as file:
                for line in file:
                    row = json.loads(line)
                    found["failed" if "error" in row else "captioned"] += 1
                    yield row
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}); remove it, and run again") from error
        if found != expected:
            raise UserError(f"{path} has {found}, and its manifest says {expected}; remove it, and run again")
        images, files = shards.listed(index)
        if (total := sum(found.values())) < images or (not files and total > images):
            raise UserError(f"{path} has {total} images, and its list {images}; remove it, and run again")
        for name, number in found.items():
            counts[name] += number


def _unique(rows: Iterable[dict[str, Any]], file: Path) -> Iterator[dict[str, Any]]:
    """The rows. Raises `UserError` at a name that came before; the names are kept in a file."""
    with closing(sqlite3.connect(file, isolation_level=None)) as names:
        names.execute("PRAGMA journal_mode = OFF")
        names.execute("PRAGMA synchronous = OFF")
        names.execute("CREATE TABLE names (name BLOB PRIMARY KEY) WITHOUT ROWID")
        names.execute("BEGIN")
        for row in rows:
            try:
                names.execute("INSERT INTO names VALUES (?)", (os.fsencode(row["name"]),))
            except sqlite3.IntegrityError as error:
                raise UserError(f"two images are called {row['name']}; merge the shards of one run alone") from error
            yield row


def _write_json(path: Path, rows: Iterable[dict[str, Any]], several: bool) -> None:
    with open(path, "wb") as file:
        file.write(b"{")
        separator = b"\n  "
        for row in rows:
            if "error" not in row:
                entry = row["captions" if several else "caption"]
                file.write(separator + to_json(row["name"], None) + b": " + to_json(entry, None))
                separator = b",\n  "
        file.write(b"\n}\n")


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]], several: bool) -> None:
    with open(path, "wb") as file:
        for row in rows:
            file.write(to_json(row, None) + b"\n")


def _write_parquet(path: Path, rows: Iterable[dict[str, Any]], several: bool) -> None:
    import pyarrow
    from pyarrow import parquet

    text = pyarrow.string()
    columns = [("name", text), ("captions", pyarrow.list_(text)) if several else ("caption", text), ("error", text)]
    schema, rows = pyarrow.schema(columns), iter(rows)
    with parquet.ParquetWriter(path, schema) as writer:
        while group := list(islice(rows, ROWS_PER_GROUP)):
            writer.write_table(pyarrow.Table.from_pylist(group, schema))
