"""The benchmark compares equal work: the authors' method, rebuilt, has the results of this library."""

import pytest
import torch

from benchmarks.bench.growth import exponent
from benchmarks.bench.measure import in_child, ratios
from benchmarks.bench.paths import _equal_captions, _near, open_path
from benchmarks.bench.report import as_markdown, machine


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stage-1 step", "stage-2 step", "captions, beams", "preprocessing"])
def test_the_rebuilt_method_of_the_authors_has_the_results_of_this_library(name):
    ways = open_path(name, "tiny")
    try:
        torch.manual_seed(0)
        assert ways.difference() < 1e-5  # raises where the results differ
    finally:
        for close in ways.close:
            close()


def test_different_results_end_a_comparison():
    with pytest.raises(ValueError, match=r"the losses differ: 1.0 and 1.1"):
        _near(1.0, 1.1, 1e-5)
    with pytest.raises(ValueError, match="the captions of image 1 differ: 'b' and 'c'"):
        _equal_captions(["a", "b"], ["a", "c"])


def test_a_failed_measurement_is_an_error_with_its_traceback(capfd):
    with pytest.raises(RuntimeError, match="a measurement failed"):
        in_child(lambda: {"ratio": 1 / 0})
    assert "ZeroDivisionError" in capfd.readouterr().err
    assert in_child(lambda: {"ratio": 2}) == {"ratio": 2}


def test_the_report_says_which_aims_are_met_and_leaves_out_what_failed():
    row = {
        "cpu": {"ours": [1.0, 2.0, 4.0], "original": [2.0, 6.0, 8.0]},
        "wall": {"ours": [1.5, 2.5, 4.5], "original": [2.0, 6.0, 8.0]},
        **{"difference": 1e-7, "setting": "greedy", "images": 4, "aim": 1.7, "load": 0.5},
    }
    results = {"command": "bench", "machine": machine(), "rounds": 3}
    sizes = {"medium": {"captions": row, "loading": row | {"aim": 2.5}}, "tiny": {}}
    text = as_markdown({**results, "parameters": {"medium": {"encoder": 1.5}, "tiny": {}}, "sizes": sizes})
    assert "| captions | 2.0000, 2.5000 | 2.00 (2.00 to 3.00) | 1.7, met |  |  | 1e-07 |" in text
    assert "| loading | 2.0000, 2.5000 | 2.00 (2.00 to 3.00) | 2.5, missed |" in text
    assert ratios(row["cpu"], "original") == {"median": 2.0, "lowest": 2.0, "highest": 3.0}


def test_exponents_are_the_slopes_between_the_last_points():
    assert exponent([1, 2, 4], [9.0, 1.0, 4.0]) == pytest.approx(2)
    assert exponent([8, 16], [3.0, 3.0]) == pytest.approx(0)
