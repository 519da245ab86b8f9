"""The curves of `docs/paper_in_miniature.md`: pairs against captions, images against reconstructions."""

from pathlib import Path
from statistics import mean

from .tables import IMAGES, LONGER, ORIGINS, PAIRS, SPLIT, Measured, scores_by_pairs, scores_of_reconstructions


def plot_curves(measured: Measured, path: str | Path) -> bool:
    """Draws what there is as one PNG; returns whether there was anything to draw.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib, of the extra vlv[miniature]") from error
    figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    drawn = False
    for label, origin in ORIGINS.items():
        scores = {pairs: values for pairs, values in scores_by_pairs(measured, origin).items() if values}
        if scores:
            drawn = True
            left.plot(list(scores), [mean(values) for values in scores.values()], "o-", label=label)
            lowest, highest = [min(v) for v in scores.values()], [max(v) for v in scores.values()]
            left.fill_between(list(scores), lowest, highest, alpha=0.2)
    if LONGER in measured:
        drawn = True
        score = measured[LONGER][SPLIT]["object_place_f1"]
        left.plot([max(PAIRS)], [score], "*", markersize=10, label="the same, gently, four times as long")
    left.set(xscale="log", xlabel="image-caption pairs", ylabel="object + place F1 of captions", ylim=(-0.02, 1.02))
    left.set_xticks(PAIRS, [f"{pairs:,}" for pairs in PAIRS])
    left.axhline(0.8, color="grey", linewidth=0.8, linestyle=":")
    images = {int(label.replace(",", "")): name for label, name in IMAGES.items() if name in measured}
    for key, label in (
        ("object_place_f1", "object + place F1"),
        ("background", "background"),
        ("exact", "exact scene"),
    ):
        if images:
            drawn = True
            scores_of = [mean(scores_of_reconstructions(measured, name, key)) for name in images.values()]
            right.plot(list(images), scores_of, "o-", label=label)
    right.set(xscale="log", xlabel="images of stage 1", ylabel="of reconstructions", ylim=(-0.02, 1.02))
    if images:
        right.set_xticks(list(images), [f"{count:,}" for count in images])
    for axes in (left, right):
        if axes.get_lines():
            axes.legend(frameon=False, fontsize=8)
        axes.minorticks_off()
    if drawn:
        figure.savefig(path)
    return drawn
