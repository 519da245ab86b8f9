"""The paper's tables in the small world: `python -m vlv.miniature.paper --root runs/miniature`.

Each measurement is written as it comes, to `ROOT/tables`, and skipped once it is there; several processes may share
the work (`--only` takes the beginning of a name). What was measured is put together by `vlv.miniature.paper.tables`.
"""

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from vlv import hub

from ..evaluation import SCENE_CLASSIFIER_FILE
from ..recipe import VARIANT_SETTINGS
from ..scene_classifier import SceneClassifier
from .data_efficiency import BATCH_SIZE, LEARNING_RATE, PAIRS, UPDATES, measure_captioner, untrained_encoder
from .embedding_probes import (
    measure_composition,
    measure_likeness_to_words,
    measure_nearest_words,
    measure_reconstructions,
    measure_truncation,
    measure_words,
)
from .out_of_distribution import measure_another_style
from .plots import plot_curves
from .tables import report

SEEDS = (0, 1, 2)
DECIDED_BELOW = 1_000  # pairs: between 200 and this the captions after stage 1 become good
GENTLY = LEARNING_RATE / 30  # for an encoder that stage 1 has trained: at the full rate captions fail
LONGER = 4 * UPDATES  # for the encoder that learns from pairs alone, lest it only lacked time


def _pairs_needed(
    root: Path,
    origin: str,
    pairs: int,
    seed: int,
    updates: int = UPDATES,
    rate: float = LEARNING_RATE,
) -> dict[str, Any]:
    """Table 7: is stage 1 needed? `rate` is that of the encoder, where it learns."""
    if origin == "stage 1":
        encoder, _ = hub.load_encoder(root / "encoder")
    else:
        encoder = untrained_encoder(root / "teacher-3", seed)
    learns = "everything" if origin == "end to end" else "projector+lm"
    return measure_captioner(
        encoder,
        root / "language-model",
        pairs,
        learns=learns,
        updates=updates,
        seed=seed,
        encoder_learning_rate=rate,
    )


def _what_learns(root: Path, learns: str, seed: int, encoder_learning_rate: float = LEARNING_RATE) -> dict[str, Any]:
    """Table 4, right: what is trained in stage 2, on the most pairs."""
    encoder, _ = hub.load_encoder(root / "encoder")
    return measure_captioner(
        encoder,
        root / "language-model",
        max(PAIRS),
        learns=learns,
        seed=seed,
        encoder_learning_rate=encoder_learning_rate,
    )


def _another_size(root: Path, size: str, seed: int) -> dict[str, Any]:
    """Table 5, right: language models of other sizes, on the pairs that tell them apart."""
    encoder, _ = hub.load_encoder(root / "encoder")
    return measure_captioner(encoder, root / f"language-model-{size}", DECIDED_BELOW, seed=seed)


def _encoder(root: Path, name: str) -> tuple[Any, Path, SceneClassifier]:
    return hub.load_encoder(root / name)[0], root / "teacher-3", SceneClassifier.load(root / SCENE_CLASSIFIER_FILE)


def _reconstructions(root: Path, name: str) -> dict[str, Any]:
    """Tables 4 (left), 5 (left) and 6: pictures from the embeddings of one encoder."""
    return measure_reconstructions(*_encoder(root, name))


def _words(root: Path) -> dict[str, Any]:
    return measure_words(root / "teacher-3", SceneClassifier.load(root / SCENE_CLASSIFIER_FILE))


def _truncation(root: Path, name: str) -> dict[str, Any]:
    return measure_truncation(*_encoder(root, name), kept=KEPT)


def _composition(root: Path, name: str) -> dict[str, Any]:
    return measure_composition(*_encoder(root, name), counts=MIXED)


def _joining(root: Path, name: str) -> dict[str, Any]:
    return measure_composition(*_encoder(root, name), counts=MIXED, single=True)


def _likeness(root: Path) -> dict[str, Any]:
    return measure_likeness_to_words(*hub.load_captioner(root / "captioner"), root / "teacher-3")


def _nearest_words(root: Path) -> dict[str, Any]:
    return measure_nearest_words(hub.load_encoder(root / "encoder")[0], root / "teacher-3")


def _another_style(root: Path) -> dict[str, Any]:
    _, teacher, scene_classifier = _encoder(root, "encoder")
    return measure_another_style(*hub.load_captioner(root / "captioner"), teacher, scene_classifier)


KEPT = (4, 8, 12, 16, 20, 24)
MIXED = ((24, 0), (24, 24), (24, 12), (12, 24), (12, 12), (18, 6), (6, 18))
ENCODERS = ("encoder", *VARIANT_SETTINGS)


@dataclass(frozen=True)
class Measurement:
    """What to run, and about how long that takes in one process beside another, on the two virtual cores."""

    run: Callable[[Path], dict[str, Any]]
    minutes: int


def _list_measurements() -> dict[str, Measurement]:
    found: dict[str, Measurement] = {}
    for origin, minutes in (("stage 1", 5), ("untrained", 6), ("end to end", 19)):
        for pairs in PAIRS:
            # Three seeds where it is decided how many pairs stage 1 needs, and with all pairs, which table 4 compares.
            several = origin == "stage 1" and (pairs <= DECIDED_BELOW or pairs == max(PAIRS))
            for seed in SEEDS if several else SEEDS[:1]:
                run = partial(_pairs_needed, origin=origin, pairs=pairs, seed=seed)
                found[f"table 7, {origin}, {pairs} pairs, seed {seed}"] = Measurement(run, minutes)
    # The encoder that learns from pairs alone must not have failed for its learning rate, or for want of time.
    for share, rate in (("a tenth", LEARNING_RATE / 10), ("a thirtieth", GENTLY)):
        run = partial(_pairs_needed, origin="end to end", pairs=max(PAIRS), seed=0, rate=rate)
        found[f"table 7, end to end at {share}, {max(PAIRS)} pairs, seed 0"] = Measurement(run, 19)
    run = partial(
        _pairs_needed, origin="end to end", pairs=max(PAIRS), seed=0, updates=LONGER, rate=LEARNING_RATE / 10
    )
    found[f"table 7, end to end at a tenth, {max(PAIRS)} pairs, {LONGER} updates"] = Measurement(run, 70)
    found["table 4, projector learns, seed 0"] = Measurement(partial(_what_learns, learns="projector", seed=0), 6)
    for name, rate, seeds in (("everything", GENTLY, SEEDS), ("everything at one rate", LEARNING_RATE, SEEDS[:1])):
        for seed in seeds:
            run = partial(_what_learns, learns="everything", seed=seed, encoder_learning_rate=rate)
            found[f"table 4, {name} learns, seed {seed}"] = Measurement(run, 24)
    for size, minutes in (("small", 4), ("large", 9)):
        for seed in SEEDS:
            run = partial(_another_size, size=size, seed=seed)
            found[f"table 5, {size} language model, seed {seed}"] = Measurement(run, minutes)
    for name in ENCODERS:
        found[f"reconstructions, {name}"] = Measurement(partial(_reconstructions, name=name), 1)
    for name in ("encoder", "encoder-120k", "encoder-tail-drop"):
        found[f"figure 6, truncation, {name}"] = Measurement(partial(_truncation, name=name), 3)
        found[f"figure 6, composition, {name}"] = Measurement(partial(_composition, name=name), 3)
        found[f"figure 6, single objects, {name}"] = Measurement(partial(_joining, name=name), 3)
    found["another style"] = Measurement(_another_style, 4)
    found["words, teacher"] = Measurement(_words, 1)
    found["words, captions"] = Measurement(_likeness, 1)
    found["words, nearest"] = Measurement(_nearest_words, 1)
    return found


MEASUREMENTS = _list_measurements()


def _file(root: Path, name: str) -> Path:
    return root / "tables" / (re.sub(r"[^a-z0-9]+", "-", name) + ".json")


def minutes_left(root: Path) -> int:
    """About how long what is not measured yet takes in one process."""
    return sum(part.minutes for name, part in MEASUREMENTS.items() if not _file(root, name).exists())


def measure(root: Path, only: tuple[str, ...] = ("",)) -> int:
    """Makes the measurements whose names begin with one of `only` and that are not there yet.

    Returns:
        How many could not be made, each said with its reason.
    """
    missing = 0
    for name, measurement in MEASUREMENTS.items():
        if not name.startswith(only):
            continue
        path = _file(root, name)
        if path.exists():
            print(f"{name}: done", flush=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        started = perf_counter()
        try:
            figures = measurement.run(root)
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
python -m vlv.miniature.paper --root runs/miniature --report docs/paper_in_miniature.md
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
    parser = argparse.ArgumentParser(prog="python -m vlv.miniature.paper", description=__doc__)
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
