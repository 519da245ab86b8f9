"""`vlv evaluate miniature`: its tables, and the scores of the embedded model."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from PIL import Image

from vlv.checkpoints import MINIATURE
from vlv.cli.main import main
from vlv.miniature.data import evaluation_items
from vlv.miniature.grammar import parse_caption, write_caption
from vlv.miniature.instructions import INSTRUCTIONS
from vlv.miniature.metrics import GOALS, METRICS, distances_table, goals_table, instructions_table, scores_table
from vlv.miniature.scene_agreement import measure_captions
from vlv.miniature.scoring import score_scenes

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


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[Path, str]:
    """The folder of a run of `vlv evaluate miniature` on few scenes, which keeps its images, and what it printed."""
    folder = tmp_path_factory.mktemp("measured")
    small = ["--scenes", "3", "--num-inference-steps", "2", "--images-dir", str(folder / "kept")]
    with redirect_stdout(io.StringIO()) as printed:
        assert main(["evaluate", "miniature", *small, "--output", str(folder / "scores.json")]) == 0
    return folder, printed.getvalue()


@pytest.mark.slow
def test_the_command_prints_its_tables_and_writes_the_scores(measured):
    folder, printed = measured
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["settings"] == {"scenes of each split": 3, "denoising steps": 2}
    assert scores_table(scores) in printed and goals_table(scores) in printed
    assert distances_table(scores) in printed and "| reconstructions | combo, guidance 2 |" in printed
    assert "| scene classifier on clean images, object + place F1 | 1.000 |" in printed


@pytest.mark.slow
def test_the_other_commands_give_the_same_figures_of_kept_images_and_captions(measured, capsys):
    folder, _ = measured
    scores, kept = json.loads((folder / "scores.json").read_text()), folder / "kept" / "test"
    features = ["--features", "scene-classifier", "--bootstrap", "0"]
    again = ["--model", "miniature", "--guidance", "1", "2", "--num_inference_steps", "2", "--batch_size", "64"]
    again += ["--noise", "position", "--seed", "0", "--pair_metrics", "cosine", "scenes", *features]
    command = ["reconstruction", "--images", str(kept / "originals"), "--output_dir", str(folder / "again"), *again]
    assert main(["evaluate", *command]) == 0
    table = capsys.readouterr().out
    generated = json.loads((folder / "again" / "results.json").read_text())["metrics"]
    for guidance in ("1", "2"):
        expected = scores[f"reconstructions, test, guidance {guidance}"]
        assert {key: generated[guidance][key]["value"] for key in expected} == pytest.approx(expected, abs=5e-5)
        for key in ("frechet_distance", "cosine"):
            assert generated[guidance][key]["value"] == pytest.approx(expected[key], abs=1e-6)
            assert f" {expected[key]:.4g} |" in table
    assert generated["1"] != generated["2"] and len(expected) == len(METRICS) + 2
    command = ["images", "--generated", str(kept / "reconstructions-guidance-2"), "--reference"]
    command += [str(kept / "originals"), "--pair-metrics", "cosine", "scenes", *features]
    assert main(["evaluate", *command, "--output", str(folder / "images.json")]) == 0
    found = json.loads((folder / "images.json").read_text())["metrics"]
    assert {key: one["value"] for key, one in found.items()} == {
        key: one["value"] for key, one in generated["2"].items()
    }
    command = ["captions", "--captions", str(kept / "captions.json"), "--references", str(kept / "references.json")]
    command += ["--read-scenes", "--bootstrap", "0", "--output", str(folder / "captions.json")]
    assert main(["evaluate", *command]) == 0
    found = json.loads((folder / "captions.json").read_text())["metrics"]
    assert {key: found[key]["value"] for key in METRICS} == pytest.approx(scores["captions, test"], abs=5e-5)


def test_scenes_of_captions_have_the_scores_of_the_miniature_and_one_for_each_image():
    _, scenes = evaluation_items("test", 12)
    captions = [write_caption(scene) for scene in scenes]
    wrong = [*captions[1:4], "", *captions[4:]]
    measured = measure_captions(wrong, [[caption] for caption in captions])
    expected = score_scenes([parse_caption(caption) for caption in wrong], scenes)
    figures = measured.figures(12, 20)
    assert {key: own["value"] for key, own in figures.items()} == pytest.approx(expected, abs=5e-5)
    assert 0 < expected["object_f1"] < 1 and figures["object_f1"]["interval"][0] < expected["object_f1"]
    assert measured.values["exact"] == [float(one == other) for one, other in zip(wrong, captions, strict=True)]
    with pytest.raises(ValueError, match="the reference 'a photo' describes no scene of the miniature; pass true"):
        measure_captions(["a photo"], [["a photo"]])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["miniature", "--images-dir", "."], "--images-dir . is not empty; give a new folder"),
        (["miniature", "--images-dir", "new", "--scenes", "1"], "--images-dir needs --scenes of at least 2"),
        (["captions", "--captions", "c.json", "--read-scenes"], "pass --references FILE"),
    ],
)
def test_settings_of_scenes_that_do_not_fit_are_named(command, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("a.png")
    assert main(["evaluate", *command]) == 2
    assert message in capsys.readouterr().err and not Path("new").exists()
