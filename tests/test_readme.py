"""What README.md refers to exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = (ROOT / "README.md").read_text(encoding="utf-8").split("## With other tools")[1].split("\n## ")[0]
ROWS = [line.strip("| ").split(" | ") for line in TOOLS.splitlines() if line.startswith("|")][2:]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_each_tool_names_its_test_or_says_no(row):
    _, _, tested = row
    files = re.findall(r"`(tests/[^`]*)`", tested)
    assert bool(files) != tested.startswith("no"), tested
    assert all((ROOT / file).is_file() for file in files), files


def test_links_lead_to_pages_and_headings():
    links = re.findall(r"\]\(([^)]*)\)", TOOLS)
    assert len(links) > 5
    for link in links:
        page, _, anchor = link.partition("#")
        target = ROOT / (page or "README.md")
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link
