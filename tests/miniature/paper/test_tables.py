"""The page shows what was measured, and says what was not."""

import pytest

from vlv.miniature.paper import measurements
from vlv.miniature.paper.measurements import MEASUREMENTS, SEEDS, Measurement
from vlv.miniature.paper.tables import SPLIT, data_efficiency, pairs_needed, report


def captions(f1: float, **others: float) -> dict:
    return {SPLIT: {"background": 1.0, "object_f1": f1, "object_place_f1": f1, "exact": 0.5, **others}}


def images(f1: float) -> dict:
    return {"background": 1.0, "object_place_f1": f1, "exact": 0.5, "centre": 0.04, "scale": 0.01, "matched": 0.9}


def of_seeds(group: list[Measurement], *results: dict) -> dict[str, dict]:
    """Results of the first seeds of one row."""
    assert len(group) >= len(results)
    return {measurement.key: result for measurement, result in zip(group, results, strict=False)}


@pytest.mark.parametrize(
    ("scores", "needed"),
    [
        ({200: 0.9, 1000: 0.95}, "fewer than 200"),
        ({200: 0.1, 1000: 0.7}, "more than 1,000"),
        ({200: 0.1, 800: 0.9, 3200: 1.0}, f"{round(200 * 4 ** (0.7 / 0.8)):,}"),
        ({}, "–"),
    ],
)
def test_pairs_needed_are_interpolated(scores, needed):
    assert pairs_needed(scores) == needed


def test_seeds_are_shown_as_mean_and_range():
    results = {m.key: captions(0.5 + 0.1 * m.settings["seed"]) for m in measurements.STAGE_1}
    text = data_efficiency(results)
    assert "| stage 1, then frozen | 0.600 (0.500 to 0.700) | 0.600 (0.500 to 0.700) | 0.500 | 0.600" in text
    assert "more than 20,000" in text
    assert "| untrained, frozen | – |" in text and "12.22 / 7.55 / 9.58 / 10.84" in text


def test_a_table_without_results_says_so():
    text = report({}, "# Title")
    assert text.startswith("# Title\n\n## ")
    assert text.count("*Not measured yet.*") == 8  # each table but the summary and table 7, which show dashes


class Recorder(dict):
    """No results; records the keys that are looked up."""

    def __init__(self):
        self.keys_looked_up = set()

    def __contains__(self, key):
        self.keys_looked_up.add(key)
        return False

    def get(self, key, default=None):
        self.keys_looked_up.add(key)
        return default


def test_the_page_shows_every_measurement_but_one_and_no_others():
    results = Recorder()
    report(results, "")
    keys = {m.key for m in MEASUREMENTS}
    tail_drop = {m.key for m in MEASUREMENTS if m.label == measurements.ENCODER_TAIL_DROP.folder}
    assert len(tail_drop) == 1  # its reconstructions are in no table, figure 6 shows it
    assert results.keys_looked_up == keys - tail_drop


def test_each_measurement_is_listed_once():
    keys = [m.key for m in MEASUREMENTS]
    assert len(keys) == len(set(keys)) == 58


def test_sizes_of_the_language_model_and_more_updates_are_shown():
    scores = [captions(0.1 * seed) for seed in SEEDS]
    results = of_seeds(measurements.SMALL, *scores) | of_seeds(measurements.LARGE, *scores)
    results |= of_seeds(measurements.MORE_UPDATES, captions(0.25, object_f1=0.5, background=0.9))
    text = report(results, "")
    assert "| 64 wide, 2 layers | 0.100 (0.000 to 0.200) | 0.500 (0.500 to 0.500) |" in text
    assert "| 128 wide, 3 layers |" not in text and "14.70 / 9.37 / 11.26 / 12.45" in text
    assert "| a tenth of it, 3,200 | 0.900 | 0.500 | 0.250 |" in text and "| a tenth of it, 800 |" not in text


@pytest.mark.parametrize(("largest", "said"), [(0.55, True), (0.65, False)])
def test_the_page_says_that_the_largest_is_not_the_best_only_if_it_is_not(largest, said):
    results = (
        of_seeds(measurements.SMALL, captions(0.5))
        | of_seeds(measurements.MIDDLE, captions(0.6))
        | of_seeds(measurements.LARGE, captions(largest))
    )
    assert ("The largest is not the best here" in report(results, "")) is said


def test_seeds_of_reconstructions_are_averaged_and_a_single_one_is_kept_whichever_it_is():
    full = [m for m in measurements.QUERY_TOKENS if m.label == "24"]
    both = of_seeds(full, images(0.6), images(0.8))
    text = report(both, "")
    assert "| 24 | 1.000 (1.000 to 1.000) | 0.700 (0.600 to 0.800) |" in text and "– → – → 0.700, 6 to 24" in text
    text = report(both | {full[2].key: images(1.0)}, "")
    assert "| 24 | 1.000 (1.000 to 1.000) | 0.800 (0.600 to 1.000) |" in text
    fewest = [m for m in measurements.QUERY_TOKENS if m.label == "6"]
    text = report({fewest[1].key: images(0.8)}, "")
    assert "| 6 | 1.000 | 0.800 | 0.500 |" in text


def test_trainable_parts_are_shown_with_the_range_of_their_seeds():
    frozen = of_seeds(measurements.PROJECTOR_AND_LANGUAGE_MODEL, captions(0.97), captions(0.98), captions(0.99))
    text = report(frozen | of_seeds(measurements.ALL_TRAINABLE, captions(0.9)), "")
    assert "| projector and language model | 1.000 (1.000 to 1.000) | 0.980 (0.970 to 0.990) |" in text
    assert "| projector, language model and encoder | 1.000 | 0.900 | 0.500 |" in text
    assert "| 0.980 → 0.900 |" in text
