"""Writes sections as one HTML file that loads nothing from elsewhere."""

import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from vlv.files import write_atomically
from vlv.version import __version__

from .content import Section, Table
from .runs import ReportSettings, read_run
from .sections import describe_runs

_ONE = r"-?[\d.,]+(?:e[-+]?\d+)?%?"
_NUMBER = re.compile(rf"(?:{_ONE}(?: to {_ONE})?(?: \({_ONE} to {_ONE}\))?)?")  # or nothing


def write_report(
    paths: Sequence[str | Path], output: Path, title: str = "Evaluation", settings: ReportSettings | None = None
) -> list[Section]:
    """Writes the page of the runs at `paths`: files of results, or folders that have a `results.json`.

    Returns:
        The sections of the page.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If a path is not the results of an evaluation; the message names it.
    """
    settings = settings or ReportSettings()
    runs = {run.path.resolve(): run for run in map(read_run, paths)}  # a run that is given twice is shown once
    sections = describe_runs(list(runs.values()), settings)
    text = render(sections, title)
    write_atomically(output, lambda path: path.write_text(text, encoding="utf-8"))
    return sections


def render(sections: Sequence[Section], title: str) -> str:
    """The page as text. Everything in the sections but charts is escaped."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    environment.filters["number_columns"] = _number_columns
    return environment.get_template("page.html").render(sections=sections, title=title, version=__version__)


def _number_columns(table: Table) -> list[bool]:
    """Of each column of a table, whether its cells are numbers or intervals."""
    columns = list(zip(*table.rows, strict=True)) if table.rows else [()] * len(table.header)
    return [any(column) and all(_NUMBER.fullmatch(cell) for cell in column) for column in columns]
