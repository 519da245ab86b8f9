"""Filters metadata of images in parquet files by rules, as a stream, and draws a sample that depends on rows alone."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .filter_report import FilterCounts, report_paths, write_reports
from .rules import COLUMNS, Rules, measure
from .run import Run, describe_files
from .tables import ROWS, TableWriter, batches, count_rows, require_columns, require_pyarrow, unified_schema

BINS = 2**20
"""Bins of hashes in which the limit of a sample is found."""


MEASURED = ("caption", "width", "height", "watermark", "aesthetic")


class Sample:
    """The rows with the smallest hashes, found in two passes with constant memory.

    The first pass counts hashes in bins; the bin in which the limit lies is then known, and of its rows alone are
    hashes compared in the second. Rows of equal hashes are ordered by their contents.

    Args:
        size: Number of rows.
        seed: Other seeds draw other samples.
    """

    def __init__(self, size: int, seed: int):
        self.size, self._key = size, str(seed).encode()
        self._counts = np.zeros(BINS, np.int64)
        self._edge: list[tuple[int, str, Any]] = []  # hash, contents and row of those in the bin of the limit

    def hashes(self, keys: Sequence[Any]) -> np.ndarray:
        """`(rows,)`: 64-bit BLAKE2 hashes of texts."""
        digests = (
            hashlib.blake2b(str(key).encode("utf-8", "surrogateescape"), digest_size=8, key=self._key).digest()
            for key in keys
        )
        return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64)

    def count(self, hashes: np.ndarray) -> None:
        """The first pass."""
        self._counts += np.bincount(_bins(hashes), minlength=BINS)

    def split(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of the second pass: which rows are in the sample, and which may be, which `keep_edge` takes."""
        bins, (limit, _) = _bins(hashes), self._limit
        return bins < limit, bins == limit

    def keep_edge(self, hashes: np.ndarray, rows: Any) -> None:
        """Takes rows of the bin of the limit, a table of pyarrow."""
        for number, value in enumerate(hashes):
            row = rows.slice(number, 1)
            self._edge.append((int(value), repr(row.to_pylist()), row))
        if len(self._edge) > 2 * self.size:  # rows of one key
            self.edge()

    def edge(self) -> list[Any]:
        """The rows of that bin which are in the sample, as tables of one row; others are forgotten."""
        _, before = self._limit
        self._edge = sorted(self._edge, key=lambda entry: entry[:2])[: self.size - before]
        return [row for *_, row in self._edge]

    @cached_property
    def _limit(self) -> tuple[int, int]:
        """The bin in which the limit lies, and the number of rows in the bins before it."""
        ends = np.cumsum(self._counts)
        limit = int(np.searchsorted(ends, self.size, side="right"))
        return limit, int(ends[limit - 1]) if limit else 0


def _bins(hashes: np.ndarray) -> np.ndarray:
    return (hashes >> np.uint64(44)).astype(np.int64)


def filter_metadata(
    files: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    rules: Rules,
    *,
    columns: Mapping[str, str] | None = None,
    sample: int | None = None,
    seed: int = 0,
    key: str | None = None,
    batch_rows: int = ROWS,
    overwrite: bool = False,
    advance: Callable[[int], None] = lambda rows: None,
    expect: Callable[[int], None] = lambda rows: None,
) -> dict[str, Any] | None:
    """Writes the rows that pass all rules, and beside them a report (`.report.json`, `.report.md`) and the manifest.

    Args:
        files: Parquet files. The rows keep their order, files in the order of their paths.
        columns: Names of columns, by what they hold as in `COLUMNS`; by default the usual names are looked for.
        sample: Number of rows to keep of those that pass: those with the smallest hashes of their `key`, whatever the
            files and their order. A share of them stands at the end of the output.
        seed: Of the sample.
        key: Column that identifies a row; by default that of the URLs.
        batch_rows: Rows in memory at a time. The output does not depend on it.
        overwrite: Replaces the output of another run.
        advance: Called with the number of rows that a pass has read.
        expect: Called with the number of rows that all passes read; a sample takes two.

    Returns:
        The counts of the manifest; None if an earlier run has done the same.

    Raises:
        ImportError: Without pyarrow.
        ValueError: If a file cannot be read, lacks a column or has it under another name than others, or the
            output is of another run.
        OSError: If the output cannot be written.
    """
    require_pyarrow()
    output, files = Path(output), sorted({os.path.abspath(file) for file in files})
    described = describe_files(files)
    if str(output.resolve()) in map(os.path.realpath, files):
        raise ValueError(f"{output} is one of the inputs; name another output")
    schema = unified_schema(files)
    names = _find_columns(schema.names, files[0], rules, dict(columns or {}))
    if sample:
        names["key"] = _key_column(schema.names, files[0], key or names.get("url"))
    require_columns(files, names, () if rules.keep_missing else rules.needed() | {"key"})
    options: dict[str, Any] = {"rules": asdict(rules), "columns": names}
    options |= {"sample": sample, "seed": seed if sample else None}
    beside = report_paths(output)
    with Run("filter", output, {"files": described}, options, overwrite=overwrite, beside=beside) as run:
        if run.finished:
            return None
        expect(count_rows(files) * (2 if sample else 1))
        reader = _Reader(files, schema, rules, names, batch_rows, advance)
        counts = FilterCounts(rules)
        chosen = None
        if sample:
            chosen = Sample(sample, seed)
            for table, kept in reader.read(counts, only_used=True):
                chosen.count(chosen.hashes(table.column(names["key"]).filter(kept).to_pylist()))
        with run.writing(output) as temporary, TableWriter(temporary, schema) as writer:
            for table, kept in reader.read(None if chosen else counts):
                rows = table.filter(kept)
                if chosen is None:
                    writer.write(rows)
                    continue
                hashes = chosen.hashes(rows.column(names["key"]).to_pylist())
                inside, edge = chosen.split(hashes)
                writer.write(rows.filter(inside))
                chosen.keep_edge(hashes[edge], rows.filter(edge))
            for row in chosen.edge() if chosen else ():
                writer.write(row)
        total = counts.as_dict() | {"written": writer.rows}
        reports = write_reports(run, total, options, rules)
        run.finish([output, *reports], {key: value for key, value in total.items() if key != "histograms"})
    return total


def _find_columns(present: Sequence[str], file: str, rules: Rules, wanted: dict[str, str]) -> dict[str, str]:
    """The names of the columns that are there, by what they hold.

    Raises:
        ValueError: If a rule needs one that is not there, or one that was named is not.
    """
    found: dict[str, str] = {}
    for kind, names in COLUMNS.items():
        candidates = (wanted[kind],) if kind in wanted else names
        name = next((name for name in candidates if name in present), None)
        if name is not None:
            found[kind] = name
        elif kind in rules.needed() or kind in wanted:
            off = {"watermark": "--max-watermark none", "aesthetic": "--min-aesthetic none"}
            remedy = off.get(kind, "--min-side none --aspect-ratio none")
            raise ValueError(
                f"{file} has no column {' or '.join(map(repr, candidates))} for the {kind}; it has "
                f"{', '.join(present)}. Name one by --{kind}-column"
                + (f", or turn the rule off by {remedy}" if kind in rules.needed() else "")
            )
    return found


def _key_column(present: Sequence[str], file: str, key: str | None) -> str:
    if key not in present:
        lacks = "URLs" if key is None else repr(key)
        raise ValueError(
            f"{file} has no column {lacks} to draw the sample by; it has {', '.join(present)}. Name one by --key"
        )
    return str(key)


class _Reader:
    """Reads the files batch by batch and applies the rules."""

    def __init__(
        self,
        files: Sequence[str],
        schema: Any,
        rules: Rules,
        names: Mapping[str, str],
        batch_rows: int,
        advance: Callable[[int], None],
    ):
        self.files, self.schema, self.rules, self.names = files, schema, rules, names
        self.batch_rows, self.advance = batch_rows, advance

    def read(self, counts: FilterCounts | None, only_used: bool = False) -> Iterator[tuple[Any, np.ndarray]]:
        """Each batch, as a table, and which of its rows pass.

        Args:
            counts: Is told of the rows.
            only_used: Whether to read no other columns than the rules, the report and the key need.
        """
        used = [name for name in self.schema.names if name in self.names.values()] if only_used else None
        for table in batches(self.files, self.schema, self.batch_rows, used):
            measures = measure({kind: self._numbers(table, kind) for kind in MEASURED if kind in self.names})
            results = self.rules.apply(measures)
            kept = np.ones(table.num_rows, bool)
            for result in results.values():
                kept &= self.rules.passing(result)
            if counts is not None:
                counts.add(measures, results, kept)
            yield table, kept
            self.advance(table.num_rows)

    def _numbers(self, table: Any, kind: str) -> np.ndarray:
        """A column as float64, NaN where there is none; numbers of characters of captions."""
        import pyarrow as pa
        from pyarrow import compute

        column = table.column(self.names[kind])
        try:
            if kind == "caption":
                column = compute.utf8_length(column.cast(pa.large_string()))
            return column.cast(pa.float64()).to_numpy(zero_copy_only=False)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            expected = "text" if kind == "caption" else "numbers"
            raise ValueError(
                f"the column {self.names[kind]!r} holds {table.column(self.names[kind]).type} that cannot be read as "
                f"{expected} for the {kind}: {error}; name another by --{kind}-column"
            ) from error
