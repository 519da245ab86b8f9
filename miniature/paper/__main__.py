"""Measures the paper's tables in the miniature: `python -m vlv.miniature.paper --root runs/miniature`.

The results of each measurement are written to ROOT/tables as soon as they are there, and a measurement with results is
skipped. Several processes may share the work, each with another --only.
"""

import argparse
from pathlib import Path

import torch

from .runner import gather, measure, write_report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vlv.miniature.paper", description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("runs/miniature"), help="folder of the trained parts")
    parser.add_argument("--only", nargs="+", default=[""], metavar="KEY", help="beginnings of measurements' keys")
    parser.add_argument("--report", type=Path, metavar="FILE.md", help="write the page with the results so far")
    parser.add_argument("--report-only", action="store_true", help="make no measurements")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.report_only:
        measure(options.root, options.only)
    if options.report:
        write_report(gather(options.root), options.report)


if __name__ == "__main__":
    main()
