"""`vlv data`: prepares data for training."""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from .errors import UserError
from .output import output_path
from .parsers.data import COLUMN_KINDS


def run_filter(arguments: argparse.Namespace) -> int:
    from vlv.preparation.filter import filter_metadata
    from vlv.preparation.rules import Rules

    output = output_path(arguments.output, ".parquet")
    columns = {kind: name for kind in COLUMN_KINDS if (name := getattr(arguments, f"{kind}_column"))}
    with _step("rows") as advance:
        rules = Rules(
            arguments.min_side,
            _aspect_ratio(arguments.aspect_ratio),
            arguments.max_watermark,
            arguments.min_aesthetic,
            arguments.keep_missing,
        )
        counts = filter_metadata(
            arguments.files,
            output,
            rules,
            columns=columns,
            sample=arguments.sample,
            seed=arguments.seed,
            key=arguments.key,
            overwrite=arguments.overwrite,
            advance=advance,
        )
    return _say(counts, output, "read {rows} rows, {passed} pass, wrote {written}")


def _aspect_ratio(values: list[float | None]) -> tuple[float, float] | None:
    if values == [None]:
        return None
    if len(values) != 2 or None in values:
        raise UserError("--aspect-ratio takes two numbers, such as 0.5 2, or none")
    return values[0], values[1]  # type: ignore[return-value]


@contextmanager
def _step(unit: str) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal; yields what advances it. What the user can correct is a `UserError`."""
    with tqdm(unit=f" {unit}", disable=None) as bar:
        try:
            yield lambda count: bar.update(count) and None
        except ValueError as error:
            raise UserError(str(error)) from error


def _say(counts: Mapping[str, Any] | None, output: object, text: str, failed: str = "") -> int:
    """Prints what a step has done; returns the exit code, 1 if the count of this name is not 0."""
    if counts is None:
        print(f"{output} is complete: nothing to do", file=sys.stderr)
        return 0
    print(f"{text.format(**counts)}: {output}", file=sys.stderr)
    return 1 if failed and counts[failed] else 0
