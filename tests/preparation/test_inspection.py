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
