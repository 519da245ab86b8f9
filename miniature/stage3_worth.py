"""How many pairs stage 3 is worth in the miniature: `python -m vlv.miniature.stage3_worth RUN.json ...`.

Reads the results of `vlv.miniature.stage3` for several seeds, and prints tables by round, means over the seeds: of
held-out scenes of `combo` and `test`, and of the captions that each round kept. The one of `combo` has the number of
pairs that give the same F1 without stage 3, interpolated in the table of few pairs (`vlv.miniature.paper`).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from vlv.evaluation import markdown_table
from vlv.files import read_json

from .paper import measurements
from .paper.tables import pairs_needed, scores_by_pairs
from .stage3 import COLUMNS, TITLES

F1 = "object_place_f1"
MEASURED = (F1, "exact", "invented", "missing", "words")


def table(runs: Sequence[dict[str, Any]], split: str, few_pairs: dict[str, Any] | None = None) -> str:
    """A row for each round that all runs have.

    Args:
        runs: Results of `vlv.miniature.stage3`.
        split: `"combo"`, `"test"` or `"kept"`.
        few_pairs: The results of the paper's tables; with them, which are of `combo`, there is a column of pairs.
    """
    by_pairs = {}
    if few_pairs is not None:
        by_pairs = {pairs: fmean(own) for pairs, own in scores_by_pairs(few_pairs, measurements.STAGE_1).items()}
    rows = []
    for rounds in zip(*(run["rounds"] for run in runs), strict=False):
        scores = [row[split] for row in rounds if split in row]
        if not scores:
            continue
        means = {name: fmean(own[name] for own in scores) for name in MEASURED}
        cells = [f"{means[name]:.{1 if name == 'words' else 3}f}" for name in MEASURED]
        of_seeds = ", ".join(f"{own[F1]:.3f}" for own in scores)
        needed = [pairs_needed(by_pairs, means[F1])] if by_pairs else []
        rows.append([str(rounds[0]["round"]), *cells, of_seeds, *needed])
    columns = ("round", *(COLUMNS[name] for name in MEASURED), "F1 of each", *(["pairs alone"] if by_pairs else []))
    return markdown_table(columns, rows)


def require_alike(runs: Sequence[dict[str, Any]]) -> None:
    """Raises `ValueError` if runs differ in more than their seeds and names, or one has not ended."""
    first = runs[0]
    for run in runs:
        name, rounds = run["settings"]["name"], run["settings"]["rounds"]
        if len(run["rounds"]) != rounds + 1:
            raise ValueError(f"{name} has {len(run['rounds']) - 1} of {rounds} rounds; run it to its end first")
        different = [
            key
            for key, value in run["settings"].items()
            if key not in ("root", "name", "seed", "start") and value != first["settings"][key]
        ]
        if different:
            raise ValueError(f"{name} and {first['settings']['name']} differ in {', '.join(different)}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vlv.miniature.stage3_worth", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN.json", help="of vlv.miniature.stage3, by seed")
    parser.add_argument(
        "--few-pairs",
        type=Path,
        default=Path("docs/paper_in_miniature.json"),
        metavar="FILE",
        help="results of the paper's tables (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    runs, few_pairs = [read_json(file) for file in options.runs], read_json(options.few_pairs)
    try:
        require_alike(runs)
    except ValueError as error:
        parser.error(str(error))
    for split, title in TITLES.items():
        print(f"{title}\n\n{table(runs, split, few_pairs if split == 'combo' else None)}\n")


if __name__ == "__main__":
    main()
