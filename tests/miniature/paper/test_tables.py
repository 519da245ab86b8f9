"""The page of the paper's tables says what was measured, and what was not."""

import json

import pytest
from PIL import Image

from vlv.miniature.paper.measurements import Measurement
from vlv.miniature.paper import measurements as paper_tables
from vlv.miniature.paper.tables import PAIRS, pairs_needed, report, table_7


@pytest.mark.parametrize(
    ("scores", "needed"),
    [
        ({200: 0.9, 1000: 0.95}, "fewer than 200"),
        ({200: 0.1, 1000: 0.7}, "more than 1,000"),
        ({200: 0.1, 800: 0.9, 3200: 1.0}, f"{round(200 * 4 ** (0.7 / 0.8)):,}"),
        ({}, "–"),
    ],
)
def test_pairs_needed(scores, needed):
    assert pairs_needed(scores) == needed


def test_means_and_ranges_of_seeds():
    measured = {
        f"table 7, stage 1, {pairs} pairs, seed {seed}": {"combo": {"object_place_f1": 0.5 + 0.1 * seed}}
        for pairs in PAIRS
        for seed in (0, 1, 2)
    }
    text = table_7(measured)
    assert "0.600 (0.500 to 0.700)" in text and "more than 20,000" in text
    assert "| untrained, frozen | – |" in text and "12.22 / 7.55 / 9.58 / 10.84" in text


def test_what_is_not_measured_is_said_to_be():
    text = report({}, "# Title")
    assert text.startswith("# Title\n\n## ") and text.count("*Not measured yet.*") >= 4


def test_measurements_are_kept_as_they_come(tmp_path, monkeypatch):
    calls = []

    def first(root):
        calls.append(root)
        return {"combo": {"object_place_f1": 1.0}}

    def second(root):
        raise RuntimeError("stopped")

    monkeypatch.setattr(
        paper_tables,
        "MEASUREMENTS",
        {"table 7, stage 1, 200 pairs, seed 0": Measurement(first, 1), "words": Measurement(second, 2)},
    )
    with pytest.raises(RuntimeError, match="stopped"):
        paper_tables.measure(tmp_path)
    assert paper_tables.minutes_left(tmp_path) == 2
    paper_tables.measure(tmp_path, only=("table 7",))
    assert calls == [tmp_path]
    paper_tables.write_report(tmp_path, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "fewer than 200" in page and "(page.png)" in page
    assert Image.open(tmp_path / "page.png").width > 600
    assert list(json.loads((tmp_path / "page.json").read_text())) == ["table 7, stage 1, 200 pairs, seed 0"]


def test_what_cannot_be_measured_is_said_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    def lacking(root):
        raise FileNotFoundError(f"no model in {root / 'encoder-30k'}")

    monkeypatch.setattr(
        paper_tables,
        "MEASUREMENTS",
        {"first": Measurement(lacking, 1), "second": Measurement(lambda root: {"figure": 1}, 2)},
    )
    assert paper_tables.measure(tmp_path) == 1
    assert "first: not measured: no model in" in capsys.readouterr().out
    assert paper_tables.gather(tmp_path) == {"second": {"figure": 1}}


def test_every_measurement_that_the_page_shows_can_be_made():
    """The page asks by name: a name that no measurement has would be missing for ever."""
    asked = set()

    class Recorder(dict):
        def __contains__(self, name):
            asked.add(name)
            return False

        def get(self, name, default=None):
            asked.add(name)
            return default

    report(Recorder(), "")
    asked = {
        name for name in asked if not name.endswith(("seed 1", "seed 2", "seed-1", "seed-2"))
    }  # not all have more than one
    assert len(asked) > 30 and asked <= set(paper_tables.MEASUREMENTS)


def test_sizes_of_the_language_model_and_a_longer_training():
    measured = {
        f"table 5, {size} language model, seed {seed}": {"combo": {"object_place_f1": 0.1 * seed, "exact": 0.5}}
        for size in ("small", "large")
        for seed in (0, 1, 2)
    }
    longer = {"object_place_f1": 0.25, "object_f1": 0.5, "background": 0.9}
    measured["table 7, end to end at a tenth, 20000 pairs, 3200 updates"] = {"combo": longer}
    text = report(measured, "")
    assert "| 64 wide, 2 layers | 0.100 (0.000 to 0.200) | 0.500 (0.500 to 0.500) |" in text
    assert "| 128 wide, 3 layers |" not in text and "14.70 / 9.37 / 11.26 / 12.45" in text
    assert "| a tenth of it, 3,200 | 0.900 | 0.500 | 0.250 |" in text and "| a tenth of it, 800 |" not in text


def test_a_larger_language_model_is_only_called_no_better_when_it_is_not():
    def page(largest: float) -> str:
        names = ("table 5, small language model", "table 7, stage 1, 1000 pairs", "table 5, large language model")
        scores = zip(names, (0.5, 0.6, largest), strict=True)
        return report({f"{n}, seed 0": {"combo": {"object_place_f1": f, "exact": 0.5}} for n, f in scores}, "")

    assert "The largest is not the best here" in page(0.55)
    assert "The largest is not the best here" not in page(0.65)


def test_figures_of_seeds_are_averaged_and_a_single_one_is_kept_whichever_it_is():
    where = {"centre": 0.04, "scale": 0.01, "matched": 0.9}
    first, second = ({"background": 1.0, "object_place_f1": f1, "exact": 0.5, **where} for f1 in (0.6, 0.8))
    both = {"reconstructions, encoder-120k": first, "reconstructions, encoder-120k-seed-1": second}
    text = report(both, "")
    assert "| 24 | 1.000 (1.000 to 1.000) | 0.700 (0.600 to 0.800) |" in text and "– → – → 0.700, 6 to 24" in text
    text = report(both | {"reconstructions, encoder-120k-seed-2": first | {"object_place_f1": 1.0}}, "")
    assert "| 24 | 1.000 (1.000 to 1.000) | 0.800 (0.600 to 1.000) |" in text
    text = report({"reconstructions, encoder-6-queries-seed-1": second}, "")
    assert "| 6 | 1.000 | 0.800 | 0.500 |" in text


def test_what_learns_is_shown_with_the_range_of_its_seeds():
    scores = {"background": 1.0, "exact": 0.5}
    frozen = {
        f"table 7, stage 1, 20000 pairs, seed {seed}": {"combo": scores | {"object_place_f1": f1}}
        for seed, f1 in enumerate((0.97, 0.98, 0.99))
    }
    text = report(frozen | {"table 4, everything learns, seed 0": {"combo": scores | {"object_place_f1": 0.9}}}, "")
    assert "| projector and language model | 1.000 (1.000 to 1.000) | 0.980 (0.970 to 0.990) |" in text
    assert "| these and the encoder | 1.000 | 0.900 | 0.500 |" in text
    assert "| 0.980 → 0.900 |" in text
