"""Chooses the best and the worst images of a run, and shows them with their captions and figures."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .content import Case, Grid, number

RANKED_BY = (
    "verdict",
    "score",
    "cosine",
    "dreamsim",
    "lpips",
    "ssim",
    "psnr",
    "clip_score",
    "ref_clip_score",
    "bert_score",
    "cider_d",
    "meteor",
    "rouge_l",
    "words",
)
"""Figures of an image by which best and worst cases are chosen: the first that a run has."""
LOWER_IS_BETTER = (
    *("lpips", "dreamsim", "repetition_4", "chair_i", "chair_s", "spatial_deviation"),
    *("centre", "scale", "distance", "angle"),  # deviations of `vlv evaluate spatial`
)

PerImage = Mapping[str, Mapping[str, float]]
"""Of each figure, its value for each image."""


def choose_ranking(per_image: PerImage, rank_by: str | None) -> str | None:
    """The figure to rank images by: `rank_by`, else the first of `RANKED_BY`, else any; None if there are none.

    Raises:
        ValueError: If `rank_by` is not a figure of the run.
    """
    if rank_by is not None and rank_by not in per_image:
        known = ", ".join(per_image) or "none"
        raise ValueError(f"rank_by is {rank_by!r}; the figures of each image are {known}")
    if rank_by is not None:
        return rank_by
    return next((key for key in (*RANKED_BY, *per_image) if key in per_image), None)


def ranked_grids(
    per_image: PerImage,
    labels: Mapping[str, str],
    describe: Callable[[str], Case],
    rank_by: str | None,
    cases: int,
) -> list[Grid]:
    """The best and the worst images, each with its figures; one grid of all if there are few.

    Args:
        labels: Of the figures.
        describe: Makes the case of an image, without figures.
        rank_by: As in `choose_ranking`.
        cases: Best cases, and as many worst ones.
    """
    key = choose_ranking(per_image, rank_by)
    if key is None or cases == 0:
        return []
    lower = key in LOWER_IS_BETTER
    names = sorted(per_image[key], key=lambda name: per_image[key][name], reverse=not lower)
    label = labels.get(key, key)
    if len(names) <= cases:
        chosen = [(f"All images, best {label} first", names)]
    else:
        worst = names[max(cases, len(names) - cases) :][::-1]
        ends = ("lowest", "highest") if lower else ("highest", "lowest")
        chosen = [(f"Best cases: {ends[0]} {label}", names[:cases]), (f"Worst cases: {ends[1]} {label}", worst)]
    return [Grid(title, [_with_values(describe(name), per_image, labels) for name in own]) for title, own in chosen]


def spread_names(values: Sequence[Mapping[str, float]], count: int) -> list[str]:
    """The images whose values differ most between several runs, the most different first."""
    shared = [name for name in values[0] if all(name in own for own in values)]
    return sorted(shared, key=lambda name: min(own[name] for own in values) - max(own[name] for own in values))[:count]


def _with_values(case: Case, per_image: PerImage, labels: Mapping[str, str]) -> Case:
    case.values += [
        (labels.get(key, key), number(values[case.name])) for key, values in per_image.items() if case.name in values
    ]
    return case


def read_per_image(content: Any) -> dict[str, dict[str, float]]:
    """The values of each image in a results file, as `results.per_image` makes them; empty if there are none."""
    found = content if isinstance(content, dict) else {}
    return {
        key: {name: value for name, value in values.items() if isinstance(value, int | float)}
        for key, values in found.items()
        if isinstance(values, dict)
    }
