"""The project's card gives the metrics that `vlv evaluate miniature` printed for the embedded model."""

import json
from pathlib import Path

from vlv.checkpoints import MINIATURE
from vlv.miniature.metrics import scores_table

ROOT = Path(__file__).parents[2]


def test_the_cards_table_equals_the_recorded_evaluation():
    recorded = json.loads((MINIATURE / "evaluation.json").read_text(encoding="utf-8"))
    assert scores_table(recorded) in (ROOT / "model_card.md").read_text(encoding="utf-8")


def test_the_readmes_table_equals_the_recorded_evaluation():
    recorded = json.loads((MINIATURE / "evaluation.json").read_text(encoding="utf-8"))
    rows = {
        "captions": "captions, combo",
        "reconstructions, guidance 2": "reconstructions, combo, guidance 2",
        "for comparison: the teacher's images of true captions": "teacher's images of prompts, combo, guidance 2",
    }
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for label, key in rows.items():
        metrics = ("background", "object_f1", "object_place_f1", "exact")
        assert f"| {label} | {' | '.join(f'{recorded[key][name]:.3f}' for name in metrics)} |" in readme
