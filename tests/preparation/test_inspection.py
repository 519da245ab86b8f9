"""`vlv data inspect`: the report and its page."""

import json
import re

import pytest

from vlv.cli.main import main

from .inputs import write_pictures


@pytest.fixture(scope="module")
def inspected(tmp_path_factory):
    """The report and the page of nine pictures, with an equal file, a broken one and a caption that is markup."""
    folder = tmp_path_factory.mktemp("data")
    pictures = write_pictures(folder / "pictures", 9, side=96)
    (pictures / "copy.png").write_bytes((pictures / "00.png").read_bytes())
    (pictures / "copy.txt").write_text("<script>alert(1)</script>")
    (pictures / "broken & bad.jpg").write_text("no picture")
    (pictures / "broken & bad.txt").write_text("")
    code = main(["data", "inspect", str(pictures), "--pairs", "--output", str(folder / "out"), "--thumbnails", "20"])
    report = json.loads((folder / "out" / "report.json").read_text())
    return code, report, (folder / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("inspect", "inspected 9 images: 6 cannot be read"),
        ("dedup", "kept 3 of 9 images, 0 duplicates in 0 groups, failed 6"),
        ("split", "failed 6"),
        ("pack", "packed 3 images in 1 shards, failed 6"),
    ],
)
def test_what_is_wrong_in_a_list_fails_alone(step, said, tmp_path, monkeypatch, capsys):
    pictures = [f"pictures/{path.name}" for path in sorted(write_pictures(tmp_path / "pictures", 3).glob("*.png"))]
    paths = ["https://x/0.png", pictures[0], "no/1.png", *pictures[1:], 300 * "x", "no\0.png", None]
    lines = [json.dumps({"image": path}) for path in paths]
    (tmp_path / "list.jsonl").write_text("\n".join([*lines, "{"]))
    (tmp_path / "list.jsonl, line 9").write_text("not what is read in place of the ninth line")
    command = ["data", step, str(tmp_path / "list.jsonl"), "--output", str(tmp_path / "out")]
    for place in ("/", tmp_path):  # the second has nothing to do
        monkeypatch.chdir(place)
        assert main(command) == 1
    printed = capsys.readouterr().err
    assert said in printed and "is complete: nothing to do" in printed
    assert "cannot read no/1.png: the file does not exist; name the folder that paths start from by" in printed
    assert f"and 3 more: {tmp_path / 'out'}" in printed
    if step == "inspect":
        failed = json.loads((tmp_path / "out" / "report.json").read_text())["failed"]
        file = tmp_path / "list.jsonl"
        broken = "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"
        missing = "the file does not exist; name the folder that paths start from by --image-root"
        assert failed == {
            "https://x/0.png": "it is a URL; `vlv data download` comes first",
            "no/1.png": missing,
            300 * "x": missing,
            "no\0.png": missing,
            "list.jsonl, line 8": f"{file}, line 8: the image is None, expected a path",
            "list.jsonl, line 9": f"{file}, line 9 is not valid JSON: {broken}",
        }


def test_lines_of_two_lists_have_names_of_their_own(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"image": 1}\n{"image": "no.png"}\n')
    assert main(["data", "inspect", str(tmp_path / "*.jsonl"), "--output", str(tmp_path / "out")]) == 1
    failed = json.loads((tmp_path / "out" / "report.json").read_text())["failed"]
    assert list(failed) == ["a.jsonl, line 1", "no.png", "b.jsonl, line 1"]


def test_the_report_counts_what_is_there(inspected):
    code, report, _ = inspected
    assert code == 1 and list(report["failed"]) == ["broken & bad.jpg"]
    assert (report["images"], report["readable"], report["formats"]) == (11, 10, {"PNG": 10})
    assert report["equal_files"] == [["00.png", "copy.png"]] and report["near_duplicates"] == []
    side = report["shorter_side"]
    assert side["smallest"] == side["largest"] == 96 and side["bins"][side["edges"].index(64)] == 10
    words = report["caption_words"]
    assert (report["captions"], report["images_without_caption"], words["median"]) == (10, 1, 3)
    assert sum(words["bins"]) == 10 and words["smallest"] == 1


def test_the_page_needs_nothing_else_and_shows_no_markup_of_the_data(inspected):
    page = inspected[2]
    assert page.count('src="data:image/jpeg;base64,') == 10 + 2  # all pictures, and the group of equal files
    assert len(re.findall(r"\b(?:src|href)=", page)) == 12
    assert "<script" not in page and "&lt;script&gt;" in page and "broken &amp; bad.jpg" in page
