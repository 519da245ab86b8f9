"""The report of `vlv data filter`: counts for each rule and histograms of each column, as JSON and Markdown."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from vlv.evaluation.markdown import markdown_table
from vlv.files import to_json

from .rules import FAILS, MISSING, Rules
from .run import Run

_SIDES = (0, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
EDGES: dict[str, tuple[float, ...]] = {
    "shorter_side": _SIDES,
    "aspect_ratio": (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3, 4),
    "watermark": tuple(number / 10 for number in range(11)),
    "aesthetic": tuple(range(11)),
    "caption_length": (0, 1, 20, 40, 80, 160, 320, 640, 1280),
}
"""Lower edges of the bins of histograms; the last bin has no upper edge."""
BAR = 30  # characters


class FilterCounts:
    """Numbers of rows, by rule and in histograms.

    Args:
        rules: Those that are applied.
    """

    def __init__(self, rules: Rules):
        self.rules, self.rows, self.passed = rules, 0, 0
        self.by_rule = {name: {"missing": 0, "removed": 0, "first": 0, "alone": 0} for name in rules.names()}
        self.histograms: dict[str, np.ndarray] = {}  # (2, bins + 2): all rows and those that pass

    def add(self, measures: Mapping[str, np.ndarray], results: Mapping[str, np.ndarray], kept: np.ndarray) -> None:
        """Counts a batch: `(rows,)` of measured values, of results, and of whether a row passes all rules."""
        self.rows += len(kept)
        self.passed += int(kept.sum())
        removed = {name: ~self.rules.passing(result) for name, result in results.items()}
        number = sum((each.astype(np.int8) for each in removed.values()), np.zeros(len(kept), np.int8))
        before = np.zeros(len(kept), bool)
        for name, result in results.items():
            counts = self.by_rule[name]
            counts["missing"] += int((result == MISSING).sum())
            counts["removed"] += int((result == FAILS).sum())
            counts["first"] += int((removed[name] & ~before).sum())
            counts["alone"] += int((removed[name] & (number == 1)).sum())
            before |= removed[name]
        for name, values in measures.items():
            bins = np.searchsorted(EDGES[name], values, side="right")
            bins[np.isnan(values)] = len(EDGES[name]) + 1
            found = [np.bincount(each, minlength=len(EDGES[name]) + 2) for each in (bins, bins[kept])]
            self.histograms[name] = self.histograms.get(name, 0) + np.stack(found)

    def as_dict(self) -> dict[str, Any]:
        """Rows, rows that pass, `rules` and `histograms`.

        Of a rule: `missing` rows lack a value; `removed` rows fail it; `first` rows are removed by it and by no rule
        before it; `alone` rows are removed by no other rule. Of a histogram: `edges`, and for `all` rows and those
        that `passed` the counts `below` the first edge, in each bin, and `missing`.
        """
        histograms = {
            name: {"edges": list(EDGES[name])}
            | {
                which: {"below": int(row[0]), "bins": row[1:-1].tolist(), "missing": int(row[-1])}
                for which, row in zip(("all", "passed"), counts, strict=True)
            }
            for name, counts in self.histograms.items()
        }
        return {"rows": self.rows, "passed": self.passed, "rules": self.by_rule, "histograms": histograms}


def report_paths(output: Path) -> list[Path]:
    """The reports beside an output."""
    return [output.with_name(f"{output.name}.report{suffix}") for suffix in (".json", ".md")]


def write_reports(run: Run, counts: Mapping[str, Any], options: Mapping[str, Any], rules: Rules) -> list[Path]:
    """Writes `.report.json` and `.report.md` beside the output; returns their paths."""
    paths = report_paths(run.output)
    run.write(paths[0], to_json({"options": dict(options), **counts}) + b"\n")
    run.write(paths[1], markdown(counts, rules).encode())
    return paths


def markdown(counts: Mapping[str, Any], rules: Rules) -> str:
    """The report for people."""
    rows = counts["rows"]
    shares = f"{rows:,} rows; {counts['passed']:,} pass all rules ({_share(counts['passed'], rows)}); "
    lines = ["# Filtered metadata", "", shares + f"{counts['written']:,} written.", ""]
    table = [
        (text, *(f"{counts['rules'][name][key]:,}" for key in ("removed", "missing", "first", "alone")))
        for name, text in rules.names().items()
    ]
    header = ("rule", "rows that fail it", "rows without a value", "removed first by it", "removed by it alone")
    treated = "kept" if rules.keep_missing else "removed"
    lines += [markdown_table(header, table), "", f"Rows without a value are {treated}.", ""]
    for name, histogram in counts["histograms"].items():
        lines += [f"## {name.replace('_', ' ')}", "", _histogram_table(histogram), ""]
    return "\n".join(lines)


def _histogram_table(histogram: Mapping[str, Any]) -> str:
    edges = [f"{edge:g}" for edge in histogram["edges"]]
    labels = [f"below {edges[0]}", *(f"{low} to {high}" for low, high in pairwise(edges))]
    labels += [f"{edges[-1]} and more", "no value"]
    columns = [
        [histogram[which]["below"], *histogram[which]["bins"], histogram[which]["missing"]]
        for which in ("all", "passed")
    ]
    highest = max(columns[0]) or 1
    rows = [
        (label, f"{count:,}", f"{passed:,}", "█" * round(BAR * count / highest))
        for label, count, passed in zip(labels, *columns, strict=True)
        if count or label[0].isdigit()
    ]
    return markdown_table(("from, below", "rows", "rows that pass", ""), rows)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "0%"
