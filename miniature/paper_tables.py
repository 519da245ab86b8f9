"""The paper's tables in the small world: `python -m vlv.miniature.paper_tables --root runs/miniature`.

Each measurement is written as it comes, to `ROOT/tables`, and skipped once it is there; several processes may share the
work (`--only` takes the beginning of a name). What was measured is put together by `vlv.evaluation.paper_tables`.
"""

import argparse
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from vlv import hub

from .few_pairs import PAIRS, measure_captioner, untrained_encoder

SEEDS = (0, 1, 2)


def _pairs_needed(root: Path, origin: str, pairs: int, seed: int) -> dict[str, Any]:
    """Table 7: is stage 1 needed?"""
    if origin == "stage 1":
        encoder, _ = hub.load_encoder(root / "encoder")
    else:
        encoder = untrained_encoder(root / "teacher-3", seed)
    learns = "everything" if origin == "end to end" else "projector+lm"
    return measure_captioner(encoder, root / "language-model", pairs, learns=learns, seed=seed)


def _what_learns(root: Path, learns: str, seed: int) -> dict[str, Any]:
    """Table 4, right: what is trained in stage 2, on the most pairs."""
    encoder, _ = hub.load_encoder(root / "encoder")
    return measure_captioner(encoder, root / "language-model", max(PAIRS), learns=learns, seed=seed)


MEASUREMENTS: dict[str, Callable[[Path], dict[str, Any]]] = {}
for _seed in SEEDS:
    for _origin in ("stage 1", "untrained", "end to end"):
        for _pairs in PAIRS:
            MEASUREMENTS[f"table 7, {_origin}, {_pairs} pairs, seed {_seed}"] = partial(
                _pairs_needed, origin=_origin, pairs=_pairs, seed=_seed
            )
for _learns in ("projector", "everything"):
    MEASUREMENTS[f"table 4, {_learns} learns, seed 0"] = partial(_what_learns, learns=_learns, seed=0)


def measure(root: Path, only: tuple[str, ...] = ("",)) -> None:
    """Makes the measurements whose names begin with one of `only` and that are not there yet."""
    for name, run in MEASUREMENTS.items():
        if not name.startswith(only):
            continue
        path = root / "tables" / (re.sub(r"[^a-z0-9]+", "-", name) + ".json")
        if path.exists():
            print(f"{name}: done", flush=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        started = perf_counter()
        found = {"name": name, "figures": run(root), "seconds": round(perf_counter() - started)}
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print(f"{name}: {found['figures']} ({found['seconds']} s)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vlv.miniature.paper_tables", description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("runs/miniature"), help="where the trained parts are")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="beginnings of measurements' names")
    options = parser.parse_args()
    torch.set_num_threads(1)
    measure(options.root, tuple(options.only))


if __name__ == "__main__":
    main()
