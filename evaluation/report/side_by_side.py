"""Sections of several runs of a kind side by side, and of the agreement of judges."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from ..protocols import SHARE_LABEL, describe_agreement
from ..published import JUDGE_SCORE, published_figures
from ..results import format_figure
from . import charts
from .content import Chart, Section, Table, as_numbers, setting_title, value_of
from .paper import published_accuracy, published_score
from .runs import KINDS, Run

JUDGE_LABELS = {False: JUDGE_SCORE, True: SHARE_LABEL}
"""What the value of `vlv evaluate judge` is, without and with other captions to compare with."""


@dataclass
class _Column:
    """What a run has measured, of a run with several settings with one of them.

    Attributes:
        run: Its name.
        title: Of the column.
        figures: As `results.figure` makes them.
        published: The label and the text of the paper's figure, by the key of the figure.
        place: The setting, if it is a number.
    """

    run: str
    title: str
    figures: Mapping[str, Mapping[str, Any]]
    published: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    place: float | None = None


def describe_together(runs: Sequence[Run]) -> list[Section]:
    """The sections of kinds that several of the runs have, and the agreement of judges."""
    sections = []
    for kind, describe in COLUMNS.items():
        same = [run for run in runs if run.kind == kind]
        if len(same) > 1 and (section := _side_by_side(same, [own for run in same for own in describe(run)])):
            sections.append(section)
    judges = [run for run in runs if run.kind == "judge" and not run.config.get("against")]
    if agreement := _agreement(judges):
        sections.append(agreement)
    return sections


def _metrics(run: Run) -> list[_Column]:
    return [_Column(run.name, run.name, run.content["metrics"])]


def _settings(run: Run) -> list[_Column]:
    groups, columns = run.content["metrics"], []
    title = setting_title(groups)
    scales = dict(zip(groups, as_numbers(groups), strict=False))  # none where settings are not numbers
    for name, figures in groups.items():
        papers = {
            key: published_figures(run.config.get("paper"), one["label"], [name]) for key, one in figures.items()
        }
        published = {key: (own[0], own[1][0]) for key, own in papers.items() if own}
        columns.append(_Column(run.name, f"{run.name}, {title} {name}", figures, published, scales.get(name)))
    return columns


def _accuracies(run: Run) -> list[_Column]:
    figures, published = {}, {}
    for prompt, one in run.content["metrics"].items():
        if accuracy := one.get("accuracy"):
            mean, *ends = (100 * accuracy[end] for end in ("mean", "low", "high"))
            label = f"accuracy, %, {prompt}"
            figures[prompt] = {"label": label, "value": mean, "interval": ends}
            if (paper := published_accuracy(run, prompt)) is not None:
                published[prompt] = f"{label} of VLV in the paper", f"{paper:.2f}"
    return [_Column(run.name, run.name, figures, published)]


def _judgements(run: Run) -> list[_Column]:
    label, value = JUDGE_LABELS[bool(run.config.get("against"))], run.content["metrics"]["value"]
    one = {"label": label, "value": value["mean"], "interval": [value["low"], value["high"]]}
    paper = published_score(run)
    published = {} if paper is None else {label: paper}
    return [_Column(run.name, run.name, {label: one}, published)]


COLUMNS = {
    "generation": _settings,
    "images": _metrics,
    "captions": _metrics,
    "judge": _judgements,
    "vqa": _accuracies,
}


def _side_by_side(runs: Sequence[Run], columns: Sequence[_Column]) -> Section | None:
    """The figures that several runs share; None if there are none."""
    labels = {key: one["label"] for own in columns for key, one in own.figures.items()}
    shared = [key for key in labels if len({own.run for own in columns if key in own.figures}) > 1]
    if not shared:
        return None
    columns = [own for own in columns if any(key in own.figures for key in shared)]
    title = f"{KINDS[runs[0].kind][0].upper()}{KINDS[runs[0].kind][1:]}: all runs"
    section = Section(title, "runs side by side", "", f"{len({own.run for own in columns})} runs")
    rows = []
    for key in shared:
        rows.append((labels[key], *(format_figure(own.figures.get(key)) for own in columns)))
        papers = [own.published.get(key, ("", "")) for own in columns]
        for title in dict.fromkeys(title for title, _ in papers if title):
            rows.append((title, *(value if own == title else "" for own, value in papers)))
        section.charts += _charts(labels[key], [(own, value_of(own.figures.get(key))) for own in columns])
    section.tables.append(Table("Figures", ("figure", *(own.title for own in columns)), rows))
    if len({run.content.get("features") for run in runs}) > 1:
        section.notes.append("the runs have different features, so their distances cannot be compared")
    return section


def _charts(title: str, found: Sequence[tuple[_Column, charts.Value | None]]) -> list[Chart]:
    """The chart of a figure: over the numeric setting of the runs, or one below the other; none without values."""
    known = [(own, value) for own, value in found if value is not None]
    places = sorted({own.place for own, _ in known if own.place is not None})
    if len(places) < 2 or any(own.place is None for own, _ in known):
        return [Chart(title, charts.dots([(own.title, value) for own, value in known]))] if known else []
    series: dict[str, dict[float | None, charts.Value]] = {}
    for own, value in known:
        series.setdefault(own.run, {})[own.place] = value
    values = {name: [own.get(place) for place in places] for name, own in series.items()}
    return [Chart(title, charts.lines(places, values, "guidance scale"))]


def _agreement(judges: Sequence[Run]) -> Section | None:
    """Agreement of each pair of judges that scored the same captions; None if no two did."""
    rows = []
    for one, other in combinations(judges, 2):
        try:
            rows.append((f"{one.name} and {other.name}", describe_agreement(one.path, other.path)))
        except ValueError:  # no caption in common
            continue
    if not rows:
        return None
    section = Section("Agreement of judges", "scores of the same captions", "", rows[0][1])
    section.tables.append(Table("Agreement", ("judges", "agreement"), rows))
    return section
