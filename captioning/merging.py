"""One file of the captions of all shards. In memory are the names of one shard, and some rows."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import chain, islice
from pathlib import Path
from typing import Any

from vlv.errors import UserError
from vlv.files import to_json, write_atomically

from .formats import GrowingCsv, unicode_row
from .inputs import Input
from .shards import ShardFolder
from .sidecars import CaptionFiles

ROWS_PER_GROUP = 10_000
"""That are written together into a CSV or parquet file."""


def merge(shards: ShardFolder, output: Path) -> dict[str, int]:
    """Writes the captions of all shards into one file, in the order of the shards.

    `.json` is `{name: caption}`, without the images that failed. The others have all rows: `name`,
    `caption` or `captions` (in `.csv` `caption_1`, ...), and `error`.

    Returns:
        The numbers of images that are `captioned` and `failed`.

    Raises:
        UserError: If a shard is missing or damaged, has images of another, or has one twice.
    """
    _require_all(shards)
    counts = {"captioned": 0, "failed": 0}
    writers = {".json": _write_json, ".jsonl": _write_jsonl, ".csv": _write_csv, ".parquet": _write_parquet}
    write = writers[output.suffix.lower()]
    rows = chain.from_iterable(_rows(shards, index, counts) for index in range(shards.count))
    num_captions = int(shards.run["settings"].get("num_captions", 1))
    write_atomically(output, lambda temporary: write(temporary, rows, num_captions))
    return counts


def read_shards(shards: ShardFolder) -> Iterator[tuple[list[Input], dict[str, Any], dict[str, str]]]:
    """What each shard has: the images with captions, their captions by name, and captions whose images are gone.

    The last are reasons by name: of a tar, parquet or list file that has changed or cannot be read any more.
    Raises `UserError` as `merge`.
    """
    _require_all(shards)
    for index in range(shards.count):
        rows = _rows(shards, index, Counter())
        entries = {row["name"]: row.get("captions", row.get("caption")) for row in rows if "error" not in row}
        inputs = shards.inputs(index)
        found = [item for item in inputs if item.name in entries]
        names, problems = {item.name for item in found}, {item.name: item.problem for item in inputs if item.problem}
        lost = {name: _problem(name, problems) for name in entries if name not in names}
        yield found, entries, lost


def _problem(name: str, problems: dict[str, str]) -> str:
    """Why an image is gone, of the problems by file."""
    own = (problem for file, problem in problems.items() if name.startswith(f"{file}/"))
    return next(own, "it is no longer among the inputs")


def is_written(files: CaptionFiles, item: Input, entry: Any) -> bool:
    """Whether the caption of an image is where it belongs."""
    try:
        return files.holds(item, entry)
    except (OSError, ValueError, UserError):
        return False


def _require_all(shards: ShardFolder) -> None:
    """Raises `UserError` if a shard is missing."""
    if missing := shards.missing():
        names = ", ".join(shards.path(index).name for index in missing[:5])
        raise UserError(
            f"{shards.folder} lacks {len(missing)} of {shards.count} shards: {names}"
            f"{', ...' if len(missing) > 5 else ''}; run `vlv caption` with the same arguments again"
        )


def _rows(shards: ShardFolder, index: int, counts: dict[str, int]) -> Iterator[dict[str, Any]]:
    """The lines of a shard; adds to the counts. Raises `UserError` as `merge`."""
    path, found = shards.path(index), {"captioned": 0, "failed": 0}
    expected, is_own = shards.counts(index), shards.owner(index)
    names: set[str] = set()
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            for line in file:
                row = json.loads(line)
                name = row["name"]
                if name in names or not is_own(name):
                    what = "twice" if name in names else "which belongs to another shard"
                    raise UserError(f"{path} has {name}, {what}; remove it, and run again")
                names.add(name)
                found["failed" if "error" in row else "captioned"] += 1
                yield row
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it, and run again") from error
    if found != expected:
        raise UserError(f"{path} has {found}, and its manifest says {expected}; remove it, and run again")
    images, files = shards.listed(index)
    if (total := sum(found.values())) < images or (not files and total > images):
        raise UserError(f"{path} has {total} images, and its list {images}; remove it, and run again")
    for name, number in found.items():
        counts[name] += number


def _write_json(path: Path, rows: Iterable[dict[str, Any]], num_captions: int) -> None:
    with open(path, "wb") as file:
        file.write(b"{")
        separator = b"\n  "
        for row in rows:
            if "error" not in row:
                entry = row["captions" if num_captions > 1 else "caption"]
                file.write(separator + to_json(row["name"], None) + b": " + to_json(entry, None))
                separator = b",\n  "
        file.write(b"\n}\n")


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]], num_captions: int) -> None:
    with open(path, "wb") as file:
        for row in rows:
            file.write(to_json(row, None) + b"\n")


def _write_csv(path: Path, rows: Iterable[dict[str, Any]], num_captions: int) -> None:
    columns = ["caption"] if num_captions == 1 else [f"caption_{number + 1}" for number in range(num_captions)]

    def entry(row: dict[str, Any]) -> dict[str, str]:
        captions = row.get("captions") or [row.get("caption", "")]
        texts = dict(zip(columns, captions, strict=False))
        return {**dict.fromkeys(columns, ""), **texts, "error": row.get("error", "")}

    rows = iter(rows)
    with closing(GrowingCsv(path)) as file:
        while group := list(islice(rows, ROWS_PER_GROUP)):
            file.add({row["name"]: entry(row) for row in group})


def _write_parquet(path: Path, rows: Iterable[dict[str, Any]], num_captions: int) -> None:
    import pyarrow
    from pyarrow import parquet

    text = pyarrow.string()
    columns = [
        ("name", text),
        ("captions", pyarrow.list_(text)) if num_captions > 1 else ("caption", text),
        ("error", text),
    ]
    schema, rows = pyarrow.schema(columns), iter(rows)
    with parquet.ParquetWriter(path, schema) as writer:
        while group := list(islice(rows, ROWS_PER_GROUP)):
            writer.write_table(pyarrow.Table.from_pylist([unicode_row(row) for row in group], schema))
