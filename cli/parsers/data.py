"""The options of `vlv data`."""

import argparse
from typing import Any

from .common import positive

COLUMN_KINDS = ("url", "caption", "width", "height", "watermark", "aesthetic")


def number_or_none(text: str) -> float | None:
    """An argparse type: a number, or `none`."""
    return None if text.lower() == "none" else float(text)


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "data",
        help="prepare data for training: filter, download, pack, find duplicates, caption, inspect, split",
        description="Prepares data. Every step writes a manifest beside its output. The same command again goes on "
        "where it was ended, and does nothing if it is done; other inputs or options need another output or "
        "--overwrite. docs/data_preparation.md has examples.",
    )
    steps = parser.add_subparsers(title="steps", metavar="STEP", required=True)
    _add_filter(steps)


def _add_filter(steps: Any) -> None:
    parser = steps.add_parser(
        "filter",
        help="metadata of images in parquet files, by size, watermark and aesthetic score",
        description="Keeps the rows of metadata (LAION's columns) that pass all rules. The defaults are those of the "
        "paper. Memory does not depend on the number of rows. Beside the output are OUT.report.md and "
        "OUT.report.json: counts for each rule and histograms of each column.",
    )
    parser.add_argument("files", nargs="+", metavar="METADATA.parquet", help="parquet files")
    _add_output(parser, "OUT.parquet", "the rows that pass")
    rule = {"type": number_or_none, "metavar": "X"}
    parser.add_argument(
        "--min-side", **rule, default=512, help="the shorter side is above X pixels, or none (default: 512)"
    )
    parser.add_argument(
        "--aspect-ratio",
        type=number_or_none,
        nargs="+",
        default=[0.5, 2.0],
        metavar="X",
        help="smallest and largest width / height, or none (default: 0.5 2)",
    )
    parser.add_argument(
        "--max-watermark", **rule, default=0.5, help="probability of a watermark below X, or none (default: 0.5)"
    )
    parser.add_argument(
        "--min-aesthetic", **rule, default=None, help="aesthetic score of at least X, or none (default: none)"
    )
    parser.add_argument(
        "--keep-missing", action="store_true", help="a row passes a rule whose value it lacks (default: it does not)"
    )
    parser.add_argument(
        "--sample",
        type=positive,
        metavar="N",
        help="keep N of the rows that pass, drawn by a hash: the same ones whatever the files and their order",
    )
    parser.add_argument("--seed", type=int, default=0, help="of --sample (default: 0)")
    parser.add_argument(
        "--key", metavar="COLUMN", help="column that --sample identifies rows by (default: that of the URLs)"
    )
    for kind in COLUMN_KINDS:
        parser.add_argument(
            f"--{kind}-column", metavar="NAME", help=f"column of the {kind} (default: LAION's usual names)"
        )
    parser.set_defaults(run="data:run_filter")


def _add_output(parser: argparse.ArgumentParser, metavar: str, what: str) -> None:
    parser.add_argument("--output", required=True, metavar=metavar, help=what)
    parser.add_argument("--overwrite", action="store_true", help="replace the output of another run of this command")
