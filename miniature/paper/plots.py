"""The curves of `docs/paper_in_miniature.md`: captions by number of pairs, reconstructions by number of images."""

from pathlib import Path
from statistics import mean
from typing import Any

from .measurements import DATA_EFFICIENCY, IMAGES, MORE_UPDATES, PAIRS
from .tables import F1, METRICS, Results, by_label, caption_scores, image_scores, scores_by_pairs


def plot_curves(results: Results, path: str | Path) -> bool:
    """Plots the available results as one PNG; returns False, and writes nothing, if there are none.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib, of the extra vlv[miniature]") from error
    figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    plotted = [_plot_captions(left, results), _plot_reconstructions(right, results)]
    for axes in (left, right):
        if axes.get_lines():
            axes.legend(frameon=False, fontsize=8)
        axes.minorticks_off()
    if any(plotted):
        figure.savefig(path)
    return any(plotted)


def _plot_captions(axes: Any, results: Results) -> bool:
    for label, group in by_label(DATA_EFFICIENCY).items():
        scores = scores_by_pairs(results, group)
        if scores:
            axes.plot(list(scores), [mean(values) for values in scores.values()], "o-", label=label)
            lowest, highest = [min(values) for values in scores.values()], [max(values) for values in scores.values()]
            axes.fill_between(list(scores), lowest, highest, alpha=0.2)
    for score in caption_scores(results, MORE_UPDATES):
        label = "the same, lower rate, 4 x updates"
        axes.plot([max(PAIRS)], [score], "*", markersize=10, label=label)
    plotted = bool(axes.get_lines())
    axes.set(xscale="log", xlabel="image-caption pairs", ylabel="object + place F1 of captions", ylim=(-0.02, 1.02))
    axes.set_xticks(PAIRS, [f"{pairs:,}" for pairs in PAIRS])
    axes.axhline(0.8, color="grey", linewidth=0.8, linestyle=":")
    return plotted


def _plot_reconstructions(axes: Any, results: Results) -> bool:
    rows = [row for row in by_label(IMAGES).values() if image_scores(results, row)]
    images = [row[0].settings["encoder"].images for row in rows]
    axes.set(xscale="log", xlabel="images of stage 1", ylabel="scores of reconstructions", ylim=(-0.02, 1.02))
    if not rows:
        return False
    for metric in (F1, "background", "exact"):
        axes.plot(images, [mean(image_scores(results, row, metric)) for row in rows], "o-", label=METRICS[metric])
    axes.set_xticks(images, [f"{count:,}" for count in images])
    return True
