"""How many pairs stage 3 is worth."""

from pathlib import Path

import pytest

from vlv.files import read_json
from vlv.miniature.stage3_worth import MEASURED, require_alike, table

FEW_PAIRS = read_json(Path(__file__).parents[2] / "docs" / "paper_in_miniature.json")


def results(*seeds):
    """Results of runs with these values by round."""
    return [
        {"rounds": [{"round": number, "combo": dict.fromkeys(MEASURED, value)} for number, value in enumerate(values)]}
        for values in seeds
    ]


def test_rows_are_means_over_seeds_and_name_the_pairs_that_give_as_much():
    runs = results((0.3, 0.75, 0.9), (0.2, 0.85))
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table(runs, "combo", FEW_PAIRS).splitlines()[2:]
    ]
    assert [row[:2] for row in rows] == [["0", "0.250"], ["1", "0.800"]]
    assert rows[0][-2:] == ["0.300, 0.200", "fewer than 200"]
    assert rows[1][-2:] == ["0.750, 0.850", "699"]  # docs/paper_in_miniature.md


def test_what_was_kept_has_no_row_for_the_start():
    runs = results((0.3, 0.5), (0.2, 0.7))
    for run in runs:
        run["rounds"][1]["kept"] = run["rounds"][1]["combo"]
    (row,) = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(runs, "kept").splitlines()[2:]]
    assert row[:2] == ["1", "0.600"] and row[-1] == "0.500, 0.700"


def test_runs_that_differ_or_have_not_ended_are_named():
    runs = results((0.3, 0.5), (0.2, 0.7))
    for seed, run in enumerate(runs):
        run["settings"] = {"name": f"run-{seed}", "seed": seed, "rounds": 1, "num_pairs": 4}
    require_alike(runs)
    runs[1]["settings"]["num_pairs"] = 2
    with pytest.raises(ValueError, match="run-1 and run-0 differ in num_pairs"):
        require_alike(runs)
    runs[1]["rounds"].pop()
    with pytest.raises(ValueError, match="run-1 has 0 of 1 rounds"):
        require_alike(runs)
