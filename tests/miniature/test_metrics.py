"""What `vlv evaluate miniature` prints, and that the embedded model reached what it had to."""

import json

from vlv.checkpoints import MINIATURE
from vlv.cli.main import main
from vlv.miniature.metrics import GOALS, figures_table, goals_table

SCORES = {"background": 1.0, "object_f1": 0.9, "object_place_f1": 0.5, "object_size_place_f1": 0.4, "exact": 0.7}


def test_both_splits_of_a_part_stand_together():
    figures = {
        "settings": {"scenes of each split": 4},
        "captions, test": SCORES,
        "autoencoder, test": SCORES | {"psnr": 28.5},
        "captions, combo": SCORES,
    }
    lines = figures_table(figures).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| captions", "| captions", "| autoencoder (28.5 dB)"]
    assert lines[2].startswith("| captions | test | 1.000 | 0.900 | 0.500 | 0.400 | 0.700")


def test_goals_say_what_was_missed():
    lines = goals_table({"captions, combo": SCORES}).splitlines()
    verdicts = {line.split(" | ")[0].strip("| "): line.split(" | ")[-1].strip("| ") for line in lines[2:]}
    assert verdicts == {
        "captions, object F1": "missed",
        "captions, object + place F1": "missed",
        "captions, background": "aim reached",
        "captions, exact scene": "floor reached",
    }


def test_the_embedded_models_figures_reach_their_floors():
    figures = json.loads((MINIATURE / "evaluation.json").read_text())
    assert all(goal.reached(figures) >= goal.floor for goal in GOALS)
    card = (MINIATURE / "README.md").read_text()
    for row in figures_table(figures).splitlines()[2:]:
        assert row in card, "the card's table is not what `vlv evaluate miniature` printed"


def test_the_command(tmp_path, capsys):
    output = tmp_path / "figures.json"
    assert main(["evaluate", "miniature", "--scenes", "2", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    figures = json.loads(output.read_text())
    assert figures["settings"]["scenes of each split"] == 2
    assert figures_table(figures) in printed and goals_table(figures) in printed
    assert "| scene classifier itself, object + place F1 | 1.000 |" in printed
