"""Measures each path at three sizes beside the authors' method and the floor: `python -m benchmarks.bench`.

    python -m benchmarks.bench --output benchmarks                      # all: 30 minutes to an hour on one core
    python -m benchmarks.bench --sizes medium --paths "stage-1 step"    # one of them, printed

Writes report.md and report.json, and with --growth also growth.md and growth.png.

`models.py` builds models and files of three sizes, `original.py` has the authors' method, and `paths.py` the ways that
are compared. `measure.py` runs them in turns, `growth.py` varies one quantity at a time, and `report.py` writes the
tables. Commands of their own are `options.py`, what options gain, `startup.py`, what a process costs before it does
anything, and `profile.py`, where the time of a path goes.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .growth import CURVES, measure_growth
from .measure import in_child, limit_threads, measure_path
from .models import SIZES, build
from .paths import PATHS
from .report import as_markdown, machine, write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=list(SIZES))
    parser.add_argument("--paths", nargs="*", choices=PATHS, default=list(PATHS), metavar="PATH")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    parser.add_argument(
        "--growth", nargs="*", choices=CURVES, metavar="CURVE", help="how the cost grows; all by default"
    )
    parser.add_argument("--output", type=Path, help="folder of report.md and report.json (default: print)")
    parser.add_argument("--add", action="store_true", help="replace these rows of --output, keep the others")
    options = parser.parse_args()
    if options.add and options.output is None:
        parser.error("--add needs --output")
    limit_threads()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    results: dict[str, Any] = {
        "command": f"python -m benchmarks.bench {shlex.join(sys.argv[1:])}".strip(),
        "machine": machine(),
        "rounds": options.rounds,
        "parameters": {size: in_child(lambda size=size: build(size).describe()) for size in options.sizes},
        "sizes": {},
    }
    if options.add:
        earlier = json.loads((options.output / "report.json").read_text())
        results |= {name: earlier[name] for name in ("command", "sizes")}
        results["parameters"] = earlier["parameters"] | results["parameters"]
    failed = False
    for size in options.sizes:
        rows = results["sizes"].setdefault(size, {})
        for name in options.paths:
            print(f"{size}: {name}", file=sys.stderr, flush=True)
            try:
                rows[name] = measure_path(name, size, options.rounds, not options.no_memory)
            except RuntimeError as error:
                print(f"{size}: {name}: {error}", file=sys.stderr)
                failed = True
                continue
            if options.output is not None:  # what is measured is kept
                write_report(options.output, results)
    if options.output is None:
        print(as_markdown(results))
    if options.growth is not None:
        measure_growth(options.growth or list(CURVES), options.output or Path())
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
