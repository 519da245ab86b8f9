"""Runs the measurements, keeps their results in `ROOT/tables`, and writes the report."""

import re
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from vlv.files import read_json, write_json

from .data_efficiency import BATCH_SIZE, UPDATES
from .measurements import MEASUREMENTS, Measurement
from .plots import plot_curves
from .tables import Results, report

INTRODUCTION = f"""# The paper in miniature

The paper's tables, measured in a world in which a caption is either right or wrong: sixteen objects on eight
backgrounds ([`miniature/README.md`](../miniature/README.md)). Written by

```bash
python -m vlv.miniature.paper --root runs/miniature --report docs/paper_in_miniature.md
```

from the measurements that the same command makes; it skips those that were made before
([`paper_in_miniature.json`](paper_in_miniature.json)). "Unseen combinations" are scenes in which every object stands
in a combination of object, background and place that no part was trained on. Updates of each captioner:
{UPDATES}, of {BATCH_SIZE} pairs.
"""


def result_file(root: Path, measurement: Measurement) -> Path:
    """Where the results of a measurement are kept."""
    return root / "tables" / (re.sub(r"[^a-z0-9]+", "-", measurement.key) + ".json")


def minutes_left(root: Path) -> int:
    """About how many minutes the missing measurements take in one process."""
    return sum(m.minutes for m in MEASUREMENTS if not result_file(root, m).exists())


def measure(root: Path, only: Sequence[str] = ("",)) -> int:
    """Makes the measurements whose keys begin with one of `only`, and skips those that were made before.

    Several processes may share the work, each with keys of its own.

    Returns:
        The number of measurements that could not be made; the reason of each is printed.
    """
    failed = 0
    for measurement in MEASUREMENTS:
        if not measurement.key.startswith(tuple(only)):
            continue
        path = result_file(root, measurement)
        if path.exists():
            print(f"{measurement.key}: done", flush=True)
            continue
        started = perf_counter()
        try:
            results = measurement.run(root, **measurement.settings)
        except OSError as error:  # a part that is not trained yet, or a font that is not installed
            print(f"{measurement.key}: not measured: {error}", flush=True)
            failed += 1
            continue
        seconds = round(perf_counter() - started)
        write_json(path, {"key": measurement.key, "results": results, "seconds": seconds})
        print(f"{measurement.key}: {results} ({seconds} s)", flush=True)
    return failed


def gather(root: Path) -> dict[str, dict[str, Any]]:
    """The results so far, by the keys of their measurements."""
    files = [path for m in MEASUREMENTS if (path := result_file(root, m)).exists()]
    return {found["key"]: found["results"] for found in map(read_json, files)}


def write_report(results: Results, path: Path) -> None:
    """Writes the page (Markdown), its curves (PNG) and the results that it shows (JSON) beside each other."""
    introduction = INTRODUCTION
    if plot_curves(results, path.with_suffix(".png")):
        introduction += f"\n![Captions by pairs, reconstructions by images]({path.stem}.png)\n"
    path.write_text(report(results, introduction), encoding="utf-8")
    write_json(path.with_suffix(".json"), results)
