"""The section of `vlv evaluate compare`: captioners side by side."""

from collections.abc import Mapping
from typing import Any

from ..results import format_figure
from . import charts
from .cases import RANKED_BY, read_per_image, spread_names
from .content import Case, Chart, Grid, Pictures, Section, Table, number, value_of
from .runs import ReportSettings, Run

RUN_FIGURES = {  # of the run itself, with their titles
    "num_captioned": "captions",
    "num_failed": "failed",
    "num_empty": "empty captions",
    "num_cut": "cut off",
    "images_per_second": "images/s",
    "load_seconds": "loading, s",
    "peak_memory_mb": "peak memory, MB",
    "peak_gpu_memory_mb": "peak GPU memory, MB",
}


def describe_comparison(run: Run, section: Section, settings: ReportSettings) -> None:
    """Fills a section with the tables, charts and cases of captioners on the same images."""
    captioners = run.content["captioners"]
    metrics = {name: own.get("metrics", {}) for name, own in captioners.items()}
    labels = {key: one["label"] for own in metrics.values() for key, one in own.items()}
    titles = [key for key in RUN_FIGURES if any(own.get(key) is not None for own in captioners.values())]
    rows = [
        (name, str(own.get("source", "")), *(_number(own.get(key)) for key in titles))
        for name, own in captioners.items()
    ]
    section.tables.append(Table("Captioners", ("name", "source", *(RUN_FIGURES[key] for key in titles)), rows))
    rows = [(label, *(format_figure(own.get(key)) for own in metrics.values())) for key, label in labels.items()]
    section.tables.append(Table("Figures", ("figure", *metrics), rows))
    differences = run.content.get("differences", [])
    if differences:
        header = ("figure", *(f"{own['first']} less {own['second']}" for own in differences))
        rows = [
            (label, *(format_figure(own["metrics"].get(key)) for own in differences)) for key, label in labels.items()
        ]
        section.tables.append(Table("Paired differences", header, [row for row in rows if any(row[1:])]))
    section.notes += [f"{name}: {own['error']}" for name, own in captioners.items() if own.get("error")]
    if "images_per_second" in titles:
        places = [(name, (speed, None)) for name, own in captioners.items() if (speed := own.get("images_per_second"))]
        section.charts.append(Chart("images/s", charts.dots(places)))
    for key, label in labels.items():
        found = [(name, value) for name, own in metrics.items() if (value := value_of(own.get(key)))]
        section.charts.append(Chart(label, charts.dots(found)))
    section.summary = _summary(metrics) or f"{len(captioners)} captioners"
    section.grids += _grids(run, settings, labels, section)


def _summary(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """The figure of each captioner that images are ranked by; empty without figures."""
    measured = {name: own for name, own in metrics.items() if own}
    key = next((key for key in RANKED_BY if measured and all(key in own for own in measured.values())), None)
    if key is None:
        return ""
    values = ", ".join(f"{name} {number(float(own[key]['value']))}" for name, own in measured.items())
    return f"{next(iter(measured.values()))[key]['label']}: {values}"


def _number(value: Any) -> str:
    return "" if value is None else number(value)


def _grids(run: Run, settings: ReportSettings, labels: Mapping[str, str], section: Section) -> list[Grid]:
    """The images on which the captioners differ most, or without figures of images the first ones."""
    captions: Mapping[str, Mapping[str, str]] = run.content.get("captions", {})
    pictures = Pictures([run.find("images"), settings.images])
    per_image = {name: read_per_image(own) for name, own in run.content.get("per_image", {}).items()}
    shared = [
        key
        for key in ([settings.rank_by] if settings.rank_by else RANKED_BY)
        if per_image and all(key in own for own in per_image.values())
    ]

    def describe(name: str) -> Case:
        case = Case(name, [("image", pictures.of(name))] if pictures.folder else [])
        for captioner, text in captions[name].items():
            values = {key: own[name] for key, own in per_image.get(captioner, {}).items() if name in own}
            figure = f" ({labels.get(shared[0], shared[0])} {number(values[shared[0]])})" if shared and values else ""
            case.texts.append((captioner, text + figure))
        return case

    if settings.cases == 0:
        return []
    names, title = list(captions)[: 2 * settings.cases], "Captions"
    if shared and len(per_image) > 1:
        names = spread_names([own[shared[0]] for own in per_image.values()], 2 * settings.cases)
        title = f"Captions: the captioners' {labels.get(shared[0], shared[0])} differs most first"
    grid = Grid(title, [describe(name) for name in names])
    if pictures.folder is None:
        section.notes.append("the images are not where the settings say; --images gives their folder")
    elif pictures.note:
        section.notes.append(pictures.note)
    return [grid]
