"""Makes the sections of a report: one for each run, and one for runs of a kind side by side."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from .. import caption_sets
from ..distances import mean_interval
from ..published import published_figures
from ..results import format_figure, format_interval
from . import charts
from .cases import LOWER_IS_BETTER, choose_ranking, ranked_grids, read_per_image
from .comparison import describe_comparison
from .content import (
    Case,
    Chart,
    Grid,
    Pictures,
    Section,
    Table,
    as_numbers,
    number,
    setting_title,
    value_of,
)
from .paper import published_accuracy, published_score
from .runs import KINDS, ReportSettings, Run
from .side_by_side import JUDGE_LABELS, describe_together

FEW = 8  # images below which a histogram says nothing
MAIN_FIGURES = ("frechet_distance", "cider_d", "clip_score", "words")  # which a summary names, if a run has them


def describe_runs(runs: Sequence[Run], settings: ReportSettings) -> list[Section]:
    """The sections of all runs, with titles of their own.

    Raises:
        ValueError: If `settings.rank_by` is not a figure of any run.
    """
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.path)
    if settings.rank_by is not None:
        _require_ranking(runs, settings.rank_by)
    sections = [_describe(run, settings) for run in runs] + describe_together(runs)
    for place, section in enumerate(sections, start=1):
        section.anchor = f"run-{place}"
    return sections


def _describe(run: Run, settings: ReportSettings) -> Section:
    section = Section(run.name, KINDS[run.kind], str(run.path))
    section.notes += [str(note) for note in run.content.get("notes", []) if isinstance(note, str)]
    DESCRIBERS[run.kind](run, section, settings)
    section.settings = [(name, _setting(value)) for name, value in run.config.items() if value not in (None, [], "")]
    versions = run.content.get("versions")
    section.versions = [(name, str(value)) for name, value in versions.items()] if isinstance(versions, dict) else []
    return section


def _setting(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def per_image_of(run: Run) -> dict[str, dict[str, float]]:
    """The values of each image of a run, by figure."""
    if run.kind == "judge":
        return read_per_image({"verdict": run.content["metrics"]["verdicts"]})
    if run.kind == "score":
        return {"score": {name: _best(value) for name, value in run.content.items()}}
    return read_per_image(run.content.get("per_image"))


def _require_ranking(runs: Sequence[Run], rank_by: str) -> None:
    """Raises `ValueError` if it is not a figure of the images of any run."""
    known: dict[str, Any] = {}
    for run in runs:
        groups = run.content.get("per_image")
        if run.kind in ("compare", "generation") and isinstance(groups, dict):  # by captioner, or by setting
            for group in groups.values():
                known |= read_per_image(group)
        else:
            known |= per_image_of(run)
    choose_ranking(known, rank_by)


def _ranking(per_image: Mapping[str, Any], settings: ReportSettings) -> str | None:
    """`settings.rank_by` where the run has it."""
    return settings.rank_by if settings.rank_by in per_image else None


def _best(value: Any) -> float:
    return max(value) if isinstance(value, list) else value


def figures_rows(figures: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Label, value and interval of each figure."""
    return [(one["label"], number(float(one["value"])), format_interval(one)) for one in figures.values()]


def _figures(run: Run, section: Section, settings: ReportSettings) -> None:
    """Results of `vlv evaluate images` and `captions`."""
    figures = run.content["metrics"]
    labels = {key: one["label"] for key, one in figures.items()}
    header = ("figure", "value", "95% interval")
    section.tables.append(Table("Figures", header, figures_rows(figures)))
    first = figures[next(key for key in (*MAIN_FIGURES, *figures) if key in figures)]
    section.summary = f"{first['label']} {number(float(first['value']))}"
    if interval := format_interval(first):
        section.summary += f" ({interval})"
    if isinstance(features := run.content.get("features"), str):
        section.notes.insert(0, f"features: {features}")
    per_image = per_image_of(run)
    section.charts += [
        Chart(labels.get(key, key), charts.histogram(list(values.values())))
        for key, values in per_image.items()
        if len(values) >= FEW
    ]
    describe = _image_pairs(run, section, settings) if run.kind == "images" else _captions(run, section, settings)
    section.grids += ranked_grids(per_image, labels, describe, _ranking(per_image, settings), settings.cases)
    _add_picture_notes(section, describe)


class _Described:
    """Makes the case of an image: pictures by title, and texts by title."""

    def __init__(self, pictures: Mapping[str, Pictures], texts: Mapping[str, Mapping[str, Sequence[str]]]):
        self.pictures = {title: own for title, own in pictures.items() if own.folder is not None}
        self.texts = texts

    def __call__(self, name: str) -> Case:
        texts = [(title, text) for title, entries in self.texts.items() for text in entries.get(name, [])]
        return Case(name, [(title, own.of(name)) for title, own in self.pictures.items()], texts)


def _add_picture_notes(section: Section, describe: _Described) -> None:
    if section.grids and not describe.pictures:
        section.notes.append("the images are not where the settings say; --images gives their folder")
    section.notes += [note for own in describe.pictures.values() if (note := own.note)]


def _image_pairs(run: Run, section: Section, settings: ReportSettings) -> _Described:
    reference = Pictures([run.find("reference"), settings.images])
    return _Described({"generated": Pictures([run.find("generated")]), "original": reference}, {})


def _captions(run: Run, section: Section, settings: ReportSettings) -> _Described:
    pictures = Pictures([run.find("images"), settings.images])
    texts = {}
    for title, setting in (("", "captions"), ("reference", "references")):
        if run.config.get(setting):
            texts[title] = _read_texts(run, setting, section)
    return _Described({"image": pictures}, texts)


def _read_texts(run: Run, setting: str, section: Section) -> dict[str, list[str]]:
    """The texts of a file by the name of the image; none, with a note, if it is not there."""
    file = run.find(setting)
    if file is None:
        section.notes.append(f"{setting}: {run.config[setting]} is not there, so its texts are not shown")
        return {}
    try:
        return caption_sets.read_texts(file)
    except ValueError as error:
        section.notes.append(str(error))
        return {}


def _generation(run: Run, section: Section, settings: ReportSettings) -> None:
    """Results of `vlv evaluate cycle`, `reconstruction`, `spatial` and `composition`: figures by setting."""
    groups = run.content["metrics"]
    labels = {key: one["label"] for figures in groups.values() for key, one in figures.items()}
    scales, title = as_numbers(groups), setting_title(groups)
    rows = []
    for key, label in labels.items():
        rows.append((label, *(format_figure(figures.get(key)) for figures in groups.values())))
        if papers := published_figures(run.config.get("paper"), label, list(groups)):
            rows.append((papers[0], *papers[1]))
    section.tables.append(Table("Figures", ("figure", *(f"{title} {name}" for name in groups)), rows))
    for key, label in labels.items():
        values = [value_of(figures.get(key)) for figures in groups.values()]
        if not any(values):
            continue
        if scales:
            section.charts.append(Chart(label, charts.lines(scales, {label: values}, "guidance scale")))
        else:
            known = [(name, value) for name, value in zip(groups, values, strict=True) if value is not None]
            section.charts.append(Chart(label, charts.dots(known)))
    first, label = next(iter(labels.items()))
    section.grids += _generated_grids(run, section, settings, labels, title)
    found = [float(figures[first]["value"]) for figures in groups.values() if first in figures]
    ends = " to ".join(map(number, (min(found), max(found))))
    section.summary = f"{label} {ends} at {title} {', '.join(groups)}"


def _generated_grids(
    run: Run, section: Section, settings: ReportSettings, labels: Mapping[str, str], title: str
) -> list[Grid]:
    """The best and the worst images: the original, and what was generated with each setting."""
    groups = {name: read_per_image(own) for name, own in run.content.get("per_image", {}).items()}
    files = run.content.get("files", {})
    known = {key: values for own in groups.values() for key, values in own.items()}
    key = choose_ranking(known, _ranking(known, settings))
    if not files or key is None:
        return []
    means = {name: fmean(own[key].values()) for name, own in groups.items() if key in own}
    chosen = (min if key in LOWER_IS_BETTER else max)(means, key=means.__getitem__)
    originals = run.content.get("originals") or {"original": None}  # of compositions, both
    pictures = {side: Pictures([run.find("images"), settings.images], own) for side, own in originals.items()}
    pictures |= {f"{title} {group}": Pictures([run.path.parent], files[group]) for group in files}
    texts: dict[str, list[str]] = {}
    written = run.path.parent / "captions.json"
    if run.config.get("captions"):
        texts = _read_texts(run, "captions", section)
    elif written.is_file():
        texts = caption_sets.read_texts(written)
    describe = _Described(pictures, {"": texts})
    per_image = groups[chosen]
    own = {figure: f"{label}, {title} {chosen}" for figure, label in labels.items()}
    grids = ranked_grids(per_image, own, describe, key, settings.cases)
    _add_picture_notes(section, describe)
    return grids


def _judge(run: Run, section: Section, settings: ReportSettings) -> None:
    """Results of `vlv evaluate judge`: scores, or comparisons."""
    figures, config = run.content["metrics"], run.config
    verdicts, failed = figures["verdicts"], figures.get("failed", {})
    mean = figures["value"]
    label = JUDGE_LABELS[bool(config.get("against"))]
    value, interval = number(float(mean["mean"])), f"{number(float(mean['low']))} to {number(float(mean['high']))}"
    rows = [
        (label, value, interval),
        ("captions judged", str(len(verdicts)), ""),
        ("captions without a verdict", str(len(failed)), ""),
    ]
    if (published := published_score(run)) is not None:
        rows.insert(1, (*published, ""))
    if "orders_agree" in figures:
        rows.append(("both orders agree", number(float(figures["orders_agree"])), ""))
    section.tables.append(Table("Figures", ("figure", "value", "95% interval"), rows))
    section.summary = f"{label} {value} ({interval})"
    edges = [-0.25, 0.25, 0.75, 1.25] if config.get("against") else [place - 0.5 for place in range(8)]
    section.charts.append(Chart(f"Verdicts: {label}", charts.histogram(list(verdicts.values()), bins=edges)))
    section.notes += [f"no verdict on {name}: {reason}" for name, reason in list(failed.items())[:5]]
    texts = {"": _read_texts(run, "captions", section)}
    if config.get("against"):
        texts = {"first": texts[""], "second": _read_texts(run, "against", section)}
    describe = _Described({"image": Pictures([run.find("images"), settings.images])}, texts)
    per_image = per_image_of(run)
    ranking = _ranking(per_image, settings)
    section.grids += ranked_grids(per_image, {"verdict": label}, describe, ranking, settings.cases)
    _add_picture_notes(section, describe)


def _vqa(run: Run, section: Section, settings: ReportSettings) -> None:
    """Results of `vlv evaluate vqa`: accuracy by prompt."""
    rows, places = [], []
    for name, one in run.content["metrics"].items():
        row = [
            name,
            str(one.get("questions", "")),
            str(len(one.get("failed", {}))),
            str(one.get("without_caption", "")),
        ]
        if accuracy := one.get("accuracy"):
            shares = [100 * accuracy[end] for end in ("mean", "low", "high")]
            row += [
                f"{shares[0]:.2f}",
                f"{shares[1]:.2f} to {shares[2]:.2f}",
                f"{100 * one['exact_match']['mean']:.2f}",
            ]
            places.append((name, (shares[0], shares[1:])))
        else:
            row += ["", "", ""]
        published = published_accuracy(run, name)
        rows.append([*row, "" if published is None else f"{published:.2f}"])
    header = ["prompt", "questions", "failed", "no caption", "accuracy, %", "95% interval", "exact match, %"]
    header.append("VLV, paper")
    if not any(row[-1] for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    section.tables.append(Table("Accuracy", header, rows))
    if places:
        section.charts.append(Chart("Accuracy, %", charts.dots(places)))
        name, (accuracy, _) = max(places, key=lambda place: place[1][0])
        section.summary = f"accuracy {accuracy:.2f}% ({name})"


def _score(run: Run, section: Section, settings: ReportSettings) -> None:
    """Results of `vlv score`."""
    each = [float(v) for value in run.content.values() for v in (value if isinstance(value, list) else [value])]
    mean, ends = fmean(each), mean_interval(each)
    rows = [
        ("mean score", number(mean), f"{number(ends[0])} to {number(ends[1])}"),
        ("median", number(median(each)), ""),
        ("lowest", number(min(each)), ""),
        ("highest", number(max(each)), ""),
        ("above 0, better than no words", f"{sum(v > 0 for v in each) / len(each):.1%}", ""),
    ]
    section.tables.append(Table("Figures", ("figure", "value", "95% interval"), rows))
    section.summary = f"mean score {number(mean)} ({number(ends[0])} to {number(ends[1])})"
    if len(each) >= FEW:
        section.charts.append(Chart("Scores", charts.histogram(each, ("no words", 0.0))))
    texts: dict[str, list[str]] = {}
    if settings.captions:
        texts = caption_sets.read_texts(settings.captions)
    else:
        section.notes.append("scores have no captions in their file; --captions gives them")
    describe = _Described({"image": Pictures([settings.images])}, {"": texts})
    section.grids += ranked_grids(per_image_of(run), {"score": "score"}, describe, None, settings.cases)
    _add_picture_notes(section, describe)


def _parts(run: Run, section: Section, settings: ReportSettings) -> None:
    """Results of `vlv evaluate miniature`: numbers for each part."""
    groups: dict[tuple[str, ...], dict[str, Mapping[str, float]]] = {}
    for part, values in run.content.items():
        for name, figures in {part: values, **{f"{part}, {k}": v for k, v in values.items()}}.items():
            if isinstance(figures, dict):
                numbers = {k: float(v) for k, v in figures.items() if isinstance(v, int | float)}
                if numbers:
                    groups.setdefault(tuple(numbers), {})[name] = numbers
    for keys, parts in groups.items():
        titles = [key.replace("_", " ") for key in keys]
        rows = [(name, *(number(values[key]) for key in keys)) for name, values in parts.items()]
        section.tables.append(Table(", ".join(titles), ("part", *titles), rows))
        for key, title in zip(keys, titles, strict=True):
            if len(parts) > 1 and all(math.isfinite(values[key]) for values in parts.values()):
                chart = charts.dots([(name, (values[key], None)) for name, values in parts.items()])
                section.charts.append(Chart(title, chart))
    section.summary = f"{sum(map(len, groups.values()))} parts"


DESCRIBERS = {
    "compare": describe_comparison,
    "generation": _generation,
    "images": _figures,
    "captions": _figures,
    "judge": _judge,
    "vqa": _vqa,
    "score": _score,
    "parts": _parts,
}
