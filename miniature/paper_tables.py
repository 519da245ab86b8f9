"""The paper's tables in the small world: `python -m vlv.miniature.paper_tables --root runs/miniature`.

Each measurement is written as it comes, to `ROOT/tables`, and skipped once it is there; several processes may share
the work (`--only` takes the beginning of a name). What was measured is put together by `vlv.evaluation.paper_tables`.
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
from vlv.evaluation.paper_plots import plot_curves
from vlv.evaluation.paper_tables import report

from .embeddings import (
    measure_composition,
    measure_likeness_to_words,
    measure_nearest_words,
    measure_reconstructions,
    measure_truncation,
    measure_words,
)
from .evaluation import RECOGNISER_FILE
from .few_pairs import BATCH_SIZE, PAIRS, UPDATES, measure_captioner, untrained_encoder
from .recipe import VARIANTS
from .recogniser import Recogniser
from .strangers import measure_another_style

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


def _encoder(root: Path, name: str) -> tuple[Any, Path, Recogniser]:
    return hub.load_encoder(root / name)[0], root / "teacher-3", Recogniser.load(root / RECOGNISER_FILE)


def _reconstructions(root: Path, name: str) -> dict[str, Any]:
    """Tables 4 (left), 5 (left) and 6: pictures from the embeddings of one encoder."""
    return measure_reconstructions(*_encoder(root, name))


def _words(root: Path) -> dict[str, Any]:
    return measure_words(root / "teacher-3", Recogniser.load(root / RECOGNISER_FILE))


def _truncation(root: Path, name: str) -> dict[str, Any]:
    return measure_truncation(*_encoder(root, name), kept=KEPT)


def _composition(root: Path, name: str) -> dict[str, Any]:
    return measure_composition(*_encoder(root, name), counts=MIXED)


def _likeness(root: Path) -> dict[str, Any]:
    return measure_likeness_to_words(*hub.load_captioner(root / "captioner"), root / "teacher-3")


def _nearest_words(root: Path) -> dict[str, Any]:
    return measure_nearest_words(hub.load_encoder(root / "encoder")[0], root / "teacher-3")


def _another_style(root: Path) -> dict[str, Any]:
    _, teacher, recogniser = _encoder(root, "encoder")
    return measure_another_style(*hub.load_captioner(root / "captioner"), teacher, recogniser)


KEPT = (4, 8, 12, 16, 20, 24)
MIXED = ((24, 0), (24, 24), (24, 12), (12, 24), (12, 12), (18, 6), (6, 18))
ENCODERS = ("encoder", *VARIANTS)
MEASUREMENTS: dict[str, Callable[[Path], dict[str, Any]]] = {}
for _seed in SEEDS:
    for _origin in ("stage 1", "untrained", "end to end"):
        for _pairs in PAIRS:
            MEASUREMENTS[f"table 7, {_origin}, {_pairs} pairs, seed {_seed}"] = partial(
                _pairs_needed, origin=_origin, pairs=_pairs, seed=_seed
            )
for _learns in ("projector", "everything"):
    MEASUREMENTS[f"table 4, {_learns} learns, seed 0"] = partial(_what_learns, learns=_learns, seed=0)

for _name in ENCODERS:
    MEASUREMENTS[f"reconstructions, {_name}"] = partial(_reconstructions, name=_name)
for _name in ("encoder", "encoder-120k", "encoder-tail-drop"):
    MEASUREMENTS[f"figure 6, truncation, {_name}"] = partial(_truncation, name=_name)
    MEASUREMENTS[f"figure 6, composition, {_name}"] = partial(_composition, name=_name)
MEASUREMENTS["another style"] = _another_style
MEASUREMENTS["words, teacher"] = _words
MEASUREMENTS["words, captions"] = _likeness
MEASUREMENTS["words, nearest"] = _nearest_words


def measure(root: Path, only: tuple[str, ...] = ("",)) -> int:
    """Makes the measurements whose names begin with one of `only` and that are not there yet.

    Returns:
        How many could not be made, each said with its reason.
    """
    missing = 0
    for name, run in MEASUREMENTS.items():
        if not name.startswith(only):
            continue
        path = root / "tables" / (re.sub(r"[^a-z0-9]+", "-", name) + ".json")
        if path.exists():
            print(f"{name}: done", flush=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        started = perf_counter()
        try:
            figures = run(root)
        except OSError as error:  # a part that is not trained yet, or a font that is not installed
            print(f"{name}: not measured: {error}", flush=True)
            missing += 1
            continue
        found = {"name": name, "figures": figures, "seconds": round(perf_counter() - started)}
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print(f"{name}: {found['figures']} ({found['seconds']} s)", flush=True)
    return missing


INTRODUCTION = """# The paper in miniature

What VLV promises, measured in a world where a caption is right or wrong: sixteen drawings on eight backgrounds
([`miniature/README.md`](../miniature/README.md)). Printed by

```bash
python -m vlv.miniature.paper_tables --root runs/miniature --report docs/paper_in_miniature.md
```

from measurements that the same command makes, or keeps where they are made
([`paper_in_miniature.json`](paper_in_miniature.json)). "Unseen combinations" are scenes of which every object
stands in a combination of object, background and place that no part was trained on. Updates of each captioner:
{updates}, of {batch} pairs.
"""


def gather(root: Path) -> dict[str, dict[str, Any]]:
    """What has been measured so far, by name."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((root / "tables").glob("*.json"))]
    return {entry["name"]: entry["figures"] for entry in found}


def write_report(root: Path, path: Path) -> None:
    """The page, and beside it the figures that it was made of."""
    measured = gather(root)
    introduction = INTRODUCTION.format(updates=UPDATES, batch=BATCH_SIZE)
    if plot_curves(measured, path.with_suffix(".png")):
        introduction += f"\n![Pairs against captions, images against reconstructions]({path.stem}.png)\n"
    path.write_text(report(measured, introduction), encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vlv.miniature.paper_tables", description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("runs/miniature"), help="where the trained parts are")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="beginnings of measurements' names")
    parser.add_argument("--report", type=Path, metavar="FILE.md", help="write the page of what is measured so far")
    parser.add_argument("--report-only", action="store_true", help="measure nothing more")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.report_only:
        measure(options.root, tuple(options.only))
    if options.report:
        write_report(options.root, options.report)


if __name__ == "__main__":
    main()
