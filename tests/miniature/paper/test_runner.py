"""Measurements are made once, their results are kept, and the committed page shows the committed results."""

import json
from pathlib import Path

import pytest
from PIL import Image

from vlv.miniature import recipe
from vlv.miniature.paper import __main__ as command
from vlv.miniature.paper import measurements, runner
from vlv.miniature.paper.measurements import MEASUREMENTS, Measurement

DOCS = Path(__file__).parents[3] / "docs"
KEY = measurements.STAGE_1[0].key


def test_the_committed_page_shows_the_committed_results(tmp_path):
    results = json.loads((DOCS / "paper_in_miniature.json").read_text())
    assert list(results) == [m.key for m in MEASUREMENTS]
    runner.write_report(results, tmp_path / "paper_in_miniature.md")
    for name in ("paper_in_miniature.md", "paper_in_miniature.json"):
        assert (tmp_path / name).read_text() == (DOCS / name).read_text()


def test_results_are_kept_as_soon_as_they_are_there(tmp_path, monkeypatch):
    calls = []

    def first(root, seed):
        calls.append((root, seed))
        return {"combo": {"object_place_f1": 1.0}}

    def second(root):
        raise RuntimeError("stopped")

    listed = [Measurement(KEY, "", first, 1, {"seed": 5}), Measurement("nearest tokens", "", second, 2)]
    monkeypatch.setattr(runner, "MEASUREMENTS", listed)
    with pytest.raises(RuntimeError, match="stopped"):
        runner.measure(tmp_path)
    assert runner.minutes_left(tmp_path) == 2
    assert runner.measure(tmp_path, only=("table 7",)) == 0
    assert calls == [(tmp_path, 5)]
    page = tmp_path / "page.md"
    monkeypatch.setattr("sys.argv", ["paper", "--root", str(tmp_path), "--report-only", "--report", str(page)])
    command.main()
    assert "fewer than 200" in page.read_text() and "(page.png)" in page.read_text()
    assert Image.open(tmp_path / "page.png").width > 600
    assert list(json.loads((tmp_path / "page.json").read_text())) == [KEY]


def test_a_measurement_that_fails_is_reported_and_the_rest_is_made(tmp_path, monkeypatch, capsys):
    def lacks_a_part(root):
        raise FileNotFoundError(f"no model in {root / 'encoder-30k'}")

    listed = [Measurement("first", "", lacks_a_part, 1), Measurement("second", "", lambda root: {"metric": 1}, 2)]
    monkeypatch.setattr(runner, "MEASUREMENTS", listed)
    assert runner.measure(tmp_path) == 1
    assert "first: not measured: no model in" in capsys.readouterr().out
    assert runner.gather(tmp_path) == {"second": {"metric": 1}}


def test_each_measurement_has_a_file_of_its_own(tmp_path):
    assert len({runner.result_file(tmp_path, m) for m in MEASUREMENTS}) == len(MEASUREMENTS)


def test_the_recipe_trains_every_part_that_is_measured():
    trained = {run.name for run in [*recipe.PARTS, *recipe.VARIANTS]}
    settings = [m.settings for m in MEASUREMENTS]
    folders = {s[name].folder for s in settings for name in ("encoder", "language_model") if name in s}
    folders |= {measurements.TEACHER, measurements.CAPTIONER, measurements.LANGUAGE_MODEL.folder}
    assert len(folders) == 18 and folders <= trained
