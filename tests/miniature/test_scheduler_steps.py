"""The benchmark of schedulers: cells, their costs and scores, and runs that go on."""

import json

import pytest
import torch

from vlv.checkpoints import MINIATURE
from vlv.miniature import scheduler_steps
from vlv.miniature.data import evaluation_items
from vlv.miniature.scene_classifier import SceneClassifier
from vlv.miniature.scheduler_steps import Cell, Scores, score


def test_a_cell_is_written_as_it_is_read():
    assert Cell.parse("dpm++/15") == Cell("dpm++", 15, 0.0, 1.0)
    assert Cell.parse("euler-a/8/0.2-0.8") == Cell("euler-a", 8, 0.2, 0.8)
    for text in ("dpm++/15", "euler-a/8/0.2-0.8", "ddim/10/0-0.5"):
        assert str(Cell.parse(text)) == text


@pytest.mark.slow
def test_scores_are_best_for_the_scenes_themselves(monkeypatch):
    monkeypatch.setattr(scheduler_steps, "FID_SAMPLES", 5)
    monkeypatch.setattr(scheduler_steps, "F1_SAMPLES", 50)
    classifier = SceneClassifier.load(MINIATURE / "scene_classifier.safetensors")
    pixels, scenes = evaluation_items("combo", 12)
    with torch.no_grad():
        originals = classifier.embed(pixels)
    same = Scores(pixels, originals, scenes, classifier)
    blurred = torch.nn.functional.avg_pool2d(pixels.float(), 15, 1, 7).to(torch.uint8)
    worse = Scores(blurred, originals, scenes, classifier)
    assert same.f1(slice(None)) == 1.0 and same.fid(slice(None)) < 0.1
    found = score(worse, same)
    assert found["f1_difference"] < 0 and found["f1_difference_interval"][1] < 0
    assert found["fid"] == pytest.approx(found["fid_difference"], abs=0.1) and found["fid_difference_interval"][0] > 0


@pytest.mark.slow
def test_a_run_writes_costs_and_scores_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scheduler_steps, "FID_SAMPLES", 3)
    arguments = [str(MINIATURE), "--count", "3", "--reference", "ddpm/2", "--work-dir", str(tmp_path / "work")]
    arguments += ["--output", str(tmp_path / "found.json"), "--cells", "dpm++/2", "dpm++/2/0-0.5"]
    scheduler_steps.main(arguments)
    found = json.loads((tmp_path / "found.json").read_text())
    assert {name: cell["rows"] for name, cell in found["cells"].items()} == {
        "ddpm/2": 4,
        "dpm++/2": 4,
        "dpm++/2/0-0.5": 3,
    }
    assert found["cells"]["ddpm/2"]["f1_difference"] == 0
    assert "| dpm++ | 2 | 0-0.5 | 3 |" in capsys.readouterr().out
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()}
    scheduler_steps.main(arguments[:-3])  # the reference alone
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()} == times
    assert json.loads((tmp_path / "found.json").read_text())["cells"] == {"ddpm/2": found["cells"]["ddpm/2"]}
    scheduler_steps.main([*arguments[:-3], "--guidance-scale", "1"])
    assert json.loads((tmp_path / "found.json").read_text())["cells"]["ddpm/2"]["rows"] == 2  # not the images before
