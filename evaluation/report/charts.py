"""Charts as SVG that stands in an HTML page and takes its colours from it."""

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

# matplotlib writes colours as numbers. These stand for colours of the page, which has a light and a dark form.
INK, MUTED = "#010101", "#020202"
SERIES = ("#030301", "#030302", "#030303", "#030304")
PAGE_COLOURS = {INK: "currentColor", MUTED: "var(--muted)"} | {
    colour: f"var(--series-{place})" for place, colour in enumerate(SERIES, start=1)
}
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vlv",
    "text.parse_math": False,
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
WIDTH, HEIGHT = 4.2, 2.4  # inches
LABEL_LENGTH = 30
_charts = itertools.count()

Value = tuple[float, Sequence[float] | None]
"""A figure and the ends of its interval, if it has one."""


def dots(rows: Sequence[tuple[str, Value]]) -> str:
    """Figures with their intervals, one below the other.

    Args:
        rows: Labels and figures, from top to bottom.
    """
    with _axes(0.5 + 0.3 * len(rows)) as (figure, axes):
        for place, (_, (value, interval)) in enumerate(rows):
            if interval:
                axes.plot(interval, (place, place), color=SERIES[0], linewidth=1.5)
            axes.plot(value, place, "o", color=SERIES[0], markersize=5)
        axes.set_yticks(range(len(rows)), [_short(label) for label, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.margins(x=0.08)
        axes.grid(axis="x", color=MUTED, alpha=0.25)
        axes.locator_params(axis="x", nbins=5)
        return _svg(figure)


def lines(places: Sequence[float], series: Mapping[str, Sequence[Value | None]], title: str) -> str:
    """Figures over a setting, with bands for their intervals.

    Args:
        places: The values of the setting.
        series: One figure for each place, or None.
        title: Of the setting.
    """
    with _axes(HEIGHT) as (figure, axes):
        for colour, (label, values) in zip(itertools.cycle(SERIES), series.items(), strict=False):
            known = [(place, value) for place, value in zip(places, values, strict=True) if value is not None]
            x = [place for place, _ in known]
            axes.plot(x, [value for _, (value, _) in known], "o-", color=colour, markersize=4, label=_short(label))
            if all(interval for _, (_, interval) in known):
                ends = list(zip(*(interval for _, (_, interval) in known if interval), strict=True))
                axes.fill_between(x, *ends, color=colour, alpha=0.2, linewidth=0)
        axes.set_xlabel(title)
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.grid(axis="y", color=MUTED, alpha=0.25)
        axes.locator_params(axis="y", nbins=5)
        if len(series) > 1:
            axes.legend(frameon=False)
        return _svg(figure)


def histogram(values: Sequence[float], mark: tuple[str, float] | None = None, bins: Any = 20) -> str:
    """How many images have which value.

    Args:
        mark: Title and place of a vertical line.
        bins: Their number, or their edges.
    """
    with _axes(HEIGHT) as (figure, axes):
        axes.hist(values, bins=bins, color=SERIES[0], alpha=0.8, edgecolor="none")
        if mark is not None:
            axes.axvline(mark[1], color=SERIES[1], linewidth=1.2, linestyle="--")
            axes.annotate(f" {mark[0]}", (mark[1], 1), xycoords=("data", "axes fraction"), va="bottom", color=INK)
        axes.set_ylabel("images")
        axes.locator_params(axis="y", nbins=5, integer=True)
        return _svg(figure)


def _short(label: str) -> str:
    """A label with its middle left out if it is long."""
    if len(label) <= LABEL_LENGTH:
        return label
    half = (LABEL_LENGTH - 1) // 2
    return f"{label[:half]}…{label[-half:]}"


class _axes:
    """A figure with one pair of axes, in the style of the page.

    Raises:
        ImportError: If matplotlib is not installed.
    """

    def __init__(self, height: float):
        try:
            import matplotlib
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("charts need matplotlib: pip install '.[eval]'") from error
        self._style = matplotlib.rc_context(STYLE)
        self._size, self._figure = (WIDTH, height), Figure

    def __enter__(self) -> tuple[Any, Any]:
        self._style.__enter__()
        figure = self._figure(figsize=self._size, layout="constrained")
        return figure, figure.subplots()

    def __exit__(self, *error: Any) -> None:
        self._style.__exit__(*error)


def _svg(figure: Any) -> str:
    """The element `<svg>` of a figure, with ids of its own and the colours of the page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = (
        re.sub(r'\s(?:xmlns(?::xlink)?|version|width|height)="[^"]*"', "", text.partition(">")[0])
        + text[text.index(">") :]
    )
    own = f"c{next(_charts)}-"
    text = re.sub(r'(\sid="|xlink:href="#|url\(#)', rf"\g<1>{own}", text)
    for colour, name in PAGE_COLOURS.items():
        text = text.replace(colour, name)
    return text.strip()
