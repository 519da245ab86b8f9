"""Results as JSON, JSON lines, CSV and parquet: each is read back as it was written, also after a cut."""

import csv
import json

import pytest
from pyarrow import parquet

from vlv.captioning import formats
from vlv.captioning.formats import caption_output, growing_file, has_results, lines_path, read_lines
from vlv.captioning.resume import read_results, record_path
from vlv.errors import UserError

RESULTS = {
    "captions": {"a.png": "one", 'b,"\n.png': 'two, "quoted"\nlines \u2028 \U0001f600', "c.png": ""},
    "lists": {"a.png": ["one", "two"], "b.png": ["x, y", "z"]},
    "scores": {"a.png": {"caption": "one", "score": 0.25, "confident": True}},
}
RESULTS["scores"]["b.png"] = {"caption": "two", "score": -1.5, "confident": False}


@pytest.mark.parametrize("suffix", formats.SUFFIXES)
@pytest.mark.parametrize("kind", RESULTS)
def test_results_are_read_as_they_were_written(tmp_path, suffix, kind):
    path, entries = tmp_path / f"c{suffix}", RESULTS[kind]
    first, *others = entries
    with growing_file(path, {first: entries[first]}) as results:
        for name in others:
            results.add({name: entries[name]})
    assert read_results(path, "--resume") == entries and list(read_results(path, "--resume")) == list(entries)
    assert list(tmp_path.iterdir()) == [path]


def test_lines_and_rows_have_names_and_captions(tmp_path):
    for suffix in (".jsonl", ".csv"):
        with growing_file(tmp_path / f"c{suffix}") as results:
            results.add({"a.png": "one"})
            results.add({"b.png": "two"})
    lines = (tmp_path / "c.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"name": "a.png", "caption": "one"},
        {"name": "b.png", "caption": "two"},
    ]
    with (tmp_path / "c.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["name", "caption"], ["a.png", "one"], ["b.png", "two"]]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_an_addition_is_on_disk_at_once_and_a_cut_one_is_left_out(tmp_path, suffix):
    path = tmp_path / f"c{suffix}"
    results = growing_file(path)
    entries = {"a.png": "one", "b.png": 'two\n"lines"', "c.png": "three\nlines\n\u00e9"}
    sizes = []
    for name, entry in entries.items():
        results.add({name: entry})
        sizes.append(path.stat().st_size)
    assert read_results(path, "--resume") == entries
    whole = path.read_bytes()
    for end in range(sizes[1], sizes[2] - 1):
        path.write_bytes(whole[:end])
        found = read_results(path, "--resume")
        assert list(found.items())[:2] == list(entries.items())[:2]
        assert len(found) == 2, whole[:end]


def test_file_names_that_are_not_unicode_come_back(tmp_path):
    for suffix in (".jsonl", ".csv", ".parquet"):
        with growing_file(tmp_path / f"c{suffix}", {"caf\udce9.png": "a dog"}):
            pass
        assert read_results(tmp_path / f"c{suffix}", "--resume") == {"caf\udce9.png": "a dog"}
    assert parquet.read_table(tmp_path / "c.parquet").column("name").to_pylist() == ["caf\\udce9.png"]


def test_damage_within_a_csv_file_is_named_and_returns_in_captions_stay(tmp_path):
    path = tmp_path / "c.csv"
    entries = {"a.png": "one\rtwo", "b.png": "three", "c.png": "four"}
    with growing_file(path, entries):
        pass
    assert read_results(path, "--resume") == entries
    path.write_bytes(path.read_bytes().replace(b"three", b'th"ree'))
    with pytest.raises(UserError, match=r"c\.csv does not hold names and captions.*row 3 is not CSV"):
        read_results(path, "--resume")


def test_parquet_is_made_of_the_lines_of_an_interrupted_run(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "ROW_GROUP", 3)
    path = tmp_path / "c.parquet"
    with pytest.raises(KeyboardInterrupt), growing_file(path) as results:
        results.add({"0": "caption 0"})
        raise KeyboardInterrupt
    assert not path.exists() and lines_path(path).exists() and has_results(path)
    with growing_file(path, read_results(path, "--resume")) as results:
        for number in range(1, 7):
            results.add({f"{number}": f"caption {number}"})
    assert [p.name for p in tmp_path.iterdir()] == ["c.parquet"]
    table = parquet.read_table(path)
    assert table.column("name").to_pylist() == [str(n) for n in range(7)]
    assert parquet.read_metadata(path).num_row_groups == 3


def test_a_run_without_results_leaves_a_table_without_rows(tmp_path):
    with growing_file(tmp_path / "c.parquet"):
        pass
    table = parquet.read_table(tmp_path / "c.parquet")
    assert (table.num_rows, table.column_names) == (0, ["name", "caption"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.jsonl", b"[1]\n"),
        ("c.jsonl", b'{"name": "a"}\n'),
        ("c.jsonl", b"text\nmore\n"),
        ("c.csv", b"a,b\n1,2\n"),
        ("c.csv", b"name,caption\n1\n"),
        ("c.parquet", b"PAR1"),
    ],
)
def test_a_file_that_holds_no_results_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"--resume: {tmp_path / name} does not hold names and captions"):
        read_lines(tmp_path / name, "--resume")


def test_each_output_has_a_record_of_its_own(tmp_path):
    outputs = [tmp_path / name for name in ("c.json", "c.jsonl", "c.csv", "c.parquet", "metadata.jsonl")]
    records = {record_path(output) for output in outputs}
    assert len(records) == len(outputs) and tmp_path / "c.resume.jsonl" in records
    assert tmp_path / ".metadata.resume.jsonl" in records


def test_an_output_is_a_file_of_a_known_format_or_the_folder_of_the_images(tmp_path):
    (tmp_path / "other").mkdir()
    assert caption_output(f"{tmp_path}/", str(tmp_path)) == tmp_path / "metadata.jsonl"
    for images in (None, str(tmp_path / "other")):
        with pytest.raises(UserError, match="has to be the only argument: vlv caption"):
            caption_output(f"{tmp_path}/", images)
    with pytest.raises(UserError, match=r"c\.txt must end in \.json, \.jsonl, \.csv or \.parquet"):
        caption_output("c.txt", None)
