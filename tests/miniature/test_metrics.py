"""`vlv evaluate miniature`: its tables, and the scores of the embedded model."""

import json
from pathlib import Path

import pytest

from vlv.checkpoints import MINIATURE
from vlv.cli.main import main
from vlv.miniature.instructions import INSTRUCTIONS
from vlv.miniature.metrics import GOALS, goals_table, instructions_table, scores_table

ROOT = Path(__file__).parents[2]
SCORES = {"background": 1.0, "object_f1": 0.9, "object_place_f1": 0.5, "object_size_place_f1": 0.4, "exact": 0.7}


def test_the_splits_of_a_measurement_are_in_rows_next_to_each_other():
    scores = {
        "settings": {"scenes of each split": 4},
        "captions, test": SCORES,
        "autoencoder, test": SCORES | {"psnr": 28.5},
        "captions, combo": SCORES,
    }
    lines = scores_table(scores).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| captions", "| captions", "| autoencoder (28.5 dB)"]
    assert lines[2].startswith("| captions | test | 1.000 | 0.900 | 0.500 | 0.400 | 0.700")


def test_the_goals_table_says_which_goals_were_missed():
    lines = goals_table({"captions, combo": SCORES}).splitlines()
    verdicts = {line.split(" | ")[0].strip("| "): line.split(" | ")[-1].strip("| ") for line in lines[2:]}
    assert verdicts == {
        "captions, object F1": "missed",
        "captions, object + place F1": "missed",
        "captions, background": "aim reached",
        "captions, exact scene": "floor reached",
    }


def test_the_embedded_models_scores_reach_their_floors_and_are_in_its_card():
    scores = json.loads((MINIATURE / "evaluation.json").read_text())
    assert all((goal.best_value(scores) or 0) >= goal.floor for goal in GOALS)
    card = (MINIATURE / "README.md").read_text()
    for table in (scores_table(scores), goals_table(scores), instructions_table(scores)):
        assert table in card, "the card's table differs from the one that `vlv evaluate miniature` prints"


def test_the_embedded_model_follows_its_instructions_and_the_docs_have_their_scores():
    scores = json.loads((MINIATURE / "evaluation.json").read_text())
    obedience = {name: values for name, values in scores.items() if "form" in values}
    assert len(obedience) == 2 * (1 + len(INSTRUCTIONS))
    assert all(values["form"] >= 0.99 and values["content_f1"] >= 0.98 for values in obedience.values())
    assert instructions_table(scores) in (ROOT / "docs" / "instructions.md").read_text()


@pytest.mark.slow
def test_captions_alone_can_be_measured(tmp_path, capsys):
    output = tmp_path / "scores.json"
    assert main(["evaluate", "miniature", "--captions-only", "--scenes", "4", "--output", str(output)]) == 0
    scores = json.loads(output.read_text())
    assert not [name for name in scores if "reconstructions" in name] and scores["captions, test"]["exact"] == 1.0
    assert instructions_table(scores) in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_prints_both_tables_and_writes_the_scores(tmp_path, capsys):
    output = tmp_path / "scores.json"
    small = ["--scenes", "2", "--num-inference-steps", "2"]
    assert main(["evaluate", "miniature", *small, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    scores = json.loads(output.read_text())
    assert scores["settings"] == {"scenes of each split": 2, "denoising steps": 2}
    assert scores_table(scores) in printed and goals_table(scores) in printed
    assert "| scene classifier on clean images, object + place F1 | 1.000 |" in printed
