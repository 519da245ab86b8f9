"""`vlv data filter`: the rules, the sample, the report."""

import json

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from vlv.cli.main import main
from vlv.preparation.filter import Sample, filter_metadata
from vlv.preparation.rules import Rules

from .inputs import metadata, write_metadata


@pytest.fixture
def file(tmp_path):
    return write_metadata(tmp_path / "metadata.parquet", 600)


def passes(row, missing=False) -> bool:
    """The paper's rules, for one row."""
    width, height, watermark = row["WIDTH"], row["HEIGHT"], row["pwatermark"]
    if width == 0:
        return missing and (watermark is None or watermark < 0.5)
    unmarked = missing if watermark is None else watermark < 0.5
    return min(width, height) > 512 and 0.5 <= width / height <= 2 and unmarked


@pytest.mark.parametrize("missing", [False, True])
def test_the_rows_that_pass_the_papers_rules_are_kept_in_order(file, tmp_path, missing):
    counts = filter_metadata([file], tmp_path / "out.parquet", Rules(keep_missing=missing))
    rows = metadata(600).to_pylist()
    expected = [row for row in rows if passes(row, missing)]
    assert parquet.read_table(tmp_path / "out.parquet").to_pylist() == expected
    assert 0 < len(expected) < 300 and (counts["rows"], counts["written"]) == (600, len(expected))
    watermark = counts["rules"]["watermark"]
    assert watermark["missing"] == sum(row["pwatermark"] is None for row in rows)
    assert watermark["removed"] == sum((row["pwatermark"] or 0) >= 0.5 for row in rows)


def test_bounds_are_those_of_the_paper(tmp_path):
    """Above 512, from 0.5 to 2, below 0.5."""
    sizes = {(512, 800): False, (513, 800): True, (600, 1200): True, (600, 1201): False, (1200, 600): True}
    table = {"url": [str(size) for size in sizes], "width": [w for w, _ in sizes], "height": [h for _, h in sizes]}
    parquet.write_table(pa.table(table | {"pwatermark": [0.49] * len(sizes)}), tmp_path / "sizes.parquet")
    parquet.write_table(
        pa.table({"url": ["marked"], "width": [600], "height": [600], "pwatermark": [0.5]}), tmp_path / "mark.parquet"
    )
    files = [tmp_path / "sizes.parquet", tmp_path / "mark.parquet"]
    filter_metadata(files, tmp_path / "out.parquet", Rules())
    kept = parquet.read_table(tmp_path / "out.parquet").column("url").to_pylist()
    assert kept == [str(size) for size, passes in sizes.items() if passes]


def test_a_sample_is_the_same_whatever_the_files_their_order_and_the_batches(tmp_path):
    whole = metadata(600)
    parquet.write_table(whole, tmp_path / "whole.parquet")
    parquet.write_table(whole.slice(250).take(list(range(349, -1, -1))), tmp_path / "a.parquet")
    parquet.write_table(whole.slice(0, 250), tmp_path / "b.parquet")

    def sample(name, files, **options):
        filter_metadata([tmp_path / f for f in files], tmp_path / name, Rules(None, None, None), **options)
        return sorted(parquet.read_table(tmp_path / name).column("URL").to_pylist())

    first = sample("1.parquet", ["whole.parquet"], sample=100)
    assert len(set(first)) == 100
    assert sample("2.parquet", ["b.parquet", "a.parquet"], sample=100, batch_rows=97) == first
    assert set(sample("3.parquet", ["whole.parquet"], sample=40)) < set(first)
    assert sample("4.parquet", ["whole.parquet"], sample=100, seed=1) != first
    assert len(sample("5.parquet", ["whole.parquet"], sample=5000)) == 600


def test_a_sample_of_rows_with_one_key_has_its_size(tmp_path):
    table = metadata(300).set_column(0, "URL", pa.array(["same"] * 300))
    parquet.write_table(table, tmp_path / "same.parquet")
    counts = filter_metadata([tmp_path / "same.parquet"], tmp_path / "o.parquet", Rules(None, None, None), sample=20)
    assert counts["written"] == parquet.read_metadata(tmp_path / "o.parquet").num_rows == 20


def test_the_output_does_not_depend_on_the_batches(file, tmp_path):
    for name, rows in (("1", 97), ("2", 600)):
        filter_metadata([file], tmp_path / f"{name}.parquet", Rules(), batch_rows=rows, sample=50)
    assert (tmp_path / "1.parquet").read_bytes() == (tmp_path / "2.parquet").read_bytes()


def test_files_may_differ_in_types_and_columns(file, tmp_path):
    other = metadata(50, seed=1).drop_columns(["AESTHETIC_SCORE"])
    other = other.set_column(2, "WIDTH", other.column("WIDTH").cast(pa.float64()))
    parquet.write_table(other, tmp_path / "other.parquet")
    counts = filter_metadata([file, tmp_path / "other.parquet"], tmp_path / "out.parquet", Rules(None, None, None))
    assert counts["rows"] == counts["written"] == 650
    assert parquet.read_table(tmp_path / "out.parquet").column("AESTHETIC_SCORE").null_count == 50


def test_the_command_reports_rules_and_histograms_and_does_nothing_again(file, tmp_path, capsys):
    command = ["data", "filter", str(file), "--output", str(tmp_path / "out.parquet"), "--min-aesthetic", "5"]
    assert main(command) == 0
    report = json.loads((tmp_path / "out.parquet.report.json").read_text())
    rule = report["rules"]["aesthetic"]
    scores = metadata(600).column("AESTHETIC_SCORE").to_pylist()
    assert rule["removed"] == sum(score < 5 for score in scores) and rule["alone"] <= rule["first"] <= rule["removed"]
    assert sum(rule["first"] for rule in report["rules"].values()) == report["rows"] - report["passed"]
    for histogram in report["histograms"].values():
        for which, rows in (("all", report["rows"]), ("passed", report["passed"])):
            assert histogram[which]["below"] + sum(histogram[which]["bins"]) + histogram[which]["missing"] == rows
    text = (tmp_path / "out.parquet.report.md").read_text()
    assert f"| aesthetic score >= 5 | {rule['removed']} | 0 | {rule['first']} | {rule['alone']} |" in text
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    assert main(command) == 0 and "nothing to do" in capsys.readouterr().err
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()} == before


def test_another_run_is_not_replaced_without_overwrite(file, tmp_path, capsys):
    command = ["data", "filter", str(file), "--output", str(tmp_path / "out.parquet")]
    assert main(command) == 0
    assert main([*command, "--sample", "5"]) == 2
    said = capsys.readouterr().err
    assert "sample was None, not 5" in said and "--overwrite" in said
    assert main([*command, "--sample", "5", "--overwrite"]) == 0
    assert parquet.read_metadata(tmp_path / "out.parquet").num_rows == 5
    write_metadata(file, 700)
    assert main([*command, "--sample", "5"]) == 2 and f"files: {file} differs" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["nan", "inf", "wide", "-1"])
def test_a_rule_takes_a_number_or_none(file, tmp_path, capsys, value):
    with pytest.raises(SystemExit):
        main(["data", "filter", str(file), "--output", str(tmp_path / "o.parquet"), f"--max-watermark={value}"])
    said = capsys.readouterr().err
    assert f"not {value}" in said and "must be" in said and "number_or_none" not in said


@pytest.mark.parametrize("value", ["2", "0.5:wide", "1:2:3", "nan:2", ":"])
def test_an_aspect_ratio_is_two_numbers_or_none(file, tmp_path, capsys, value):
    """It stands before the files, which it does not take for its own."""
    command = ["data", "filter", "--output", str(tmp_path / "o.parquet")]
    with pytest.raises(SystemExit):
        main([*command, "--aspect-ratio", value, str(file)])
    assert f"must be two numbers, such as 0.5:2, or none, not {value}" in capsys.readouterr().err
    assert main([*command, "--aspect-ratio", "0.5:1", str(file)]) == 0


def test_a_report_of_the_user_is_not_replaced(file, tmp_path, capsys):
    (tmp_path / "o.parquet.report.md").write_text("mine")
    assert main(["data", "filter", str(file), "--output", str(tmp_path / "o.parquet")]) == 2
    assert "o.parquet.report.md exists" in capsys.readouterr().err
    assert (tmp_path / "o.parquet.report.md").read_text() == "mine"


def test_rows_of_one_key_do_not_pile_up():
    chosen, hashes = Sample(10, 0), np.full(50, 7, np.uint64)
    for _ in range(2):
        chosen.count(hashes)
    for first in (0, 50):
        chosen.keep_edge(hashes, pa.table({"number": [f"{number:03d}" for number in range(first, first + 50)]}))
        assert len(chosen._edge) == 10
    assert [row.to_pylist()[0]["number"] for row in chosen.edge()] == [f"{number:03d}" for number in range(10)]


@pytest.mark.parametrize("step", ["filter", "download"])
def test_files_that_name_a_column_otherwise_are_refused_by_name(file, tmp_path, capsys, step):
    other = tmp_path / "other.parquet"
    parquet.write_table(metadata(5).rename_columns([name.lower() for name in metadata(1).column_names]), other)
    command = ["data", step, str(file), str(other), "--output", str(tmp_path / "out.parquet")]
    assert main([*command, *(["--img2dataset", "true"] if step == "download" else [])]) == 2
    said = capsys.readouterr().err
    assert f"{file} has no column 'url' for the url" in said and "it has 'URL' there" in said


def test_files_without_a_column_of_a_rule_are_refused_unless_missing_values_pass(file, tmp_path, capsys):
    other = tmp_path / "other.parquet"
    parquet.write_table(metadata(5).drop_columns(["pwatermark"]), other)
    command = ["data", "filter", str(file), str(other), "--output", str(tmp_path / "out.parquet")]
    assert main(command) == 2 and f"{other} has no column 'pwatermark'" in capsys.readouterr().err
    assert main([*command, "--keep-missing"]) == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--watermark-column", "wm"], "has no column 'wm' for the watermark; it has URL, TEXT"),
        (["--aspect-ratio", "2:0.5"], "expected two numbers above 0 in order"),
        (["--sample", "5", "--key", "id"], "no column 'id' to draw the sample by"),
        (["--width-column", "TEXT"], "the column 'TEXT' holds"),
    ],
)
def test_bad_options_say_what_is_expected(file, tmp_path, capsys, arguments, expected):
    assert main(["data", "filter", str(file), "--output", str(tmp_path / "out.parquet"), *arguments]) == 2
    assert expected in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} - {"out.parquet.manifest.json"} <= {
        file.name,
        ".out.parquet.progress",
    }


def test_a_run_that_has_made_nothing_does_not_keep_the_corrected_command_from_running(file, tmp_path):
    command = ["data", "filter", str(file), "--output", str(tmp_path / "out.parquet")]
    assert main([*command, "--width-column", "TEXT"]) == 2
    assert main(command) == 0


def test_damaged_and_missing_files_are_named(file, tmp_path, capsys):
    file.write_bytes(file.read_bytes()[:-20])
    for name, expected in ((file, f"{file} cannot be read as parquet"), (tmp_path / "no.parquet", "does not exist")):
        assert main(["data", "filter", str(name), "--output", str(tmp_path / "out.parquet")]) == 2
        assert expected in capsys.readouterr().err


def test_a_file_with_two_columns_of_one_name_is_named(tmp_path, capsys):
    table = metadata(3)
    twice = tmp_path / "twice.parquet"
    parquet.write_table(table.append_column("TEXT", table.column("TEXT")), twice)
    assert main(["data", "filter", str(twice), "--output", str(tmp_path / "out.parquet")]) == 2
    assert f"{twice} has more than one column 'TEXT'" in capsys.readouterr().err
