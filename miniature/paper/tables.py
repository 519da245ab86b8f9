"""The paper's tables beside the results of the miniature, as Markdown: `docs/paper_in_miniature.md`.

Results come by the key of their measurement (`measurements`). The paper's numbers are those of arXiv 2507.07104 v2.
Its FID of photographs and the miniature's exact scores are different metrics, so only the direction of a change, and
how large it is, can be compared.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from math import exp, log
from statistics import mean
from typing import Any

from vlv.evaluation import markdown_table

from ..metrics import METRICS
from . import measurements
from .embedding_probes import ANOTHER_IMAGE, SAME_IMAGE
from .measurements import PAIRS, Measurement, with_pairs

Results = Mapping[str, Mapping[str, Any]]
SPLIT = "combo"
MISSING = "–"
NOT_YET = "*Not measured yet.*"
F1 = "object_place_f1"
RECONSTRUCTIONS = (
    "Reconstructions of unseen combinations, guidance 2, read by the scene classifier; one seed, or the mean of "
    "several and their range."
)


def number(value: float | None, digits: int = 3) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"


def spread(values: Sequence[float]) -> str:
    """The mean of several values with their range, or the one value."""
    if not values:
        return MISSING
    if len(values) == 1:
        return number(values[0])
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def pairs_needed(scores: Mapping[int, float], target: float = 0.8) -> str:
    """The number of pairs at which a score first reaches `target`, interpolated on a logarithmic scale.

    Args:
        scores: The score of each number of pairs.
    """
    known = sorted(scores.items())
    if not known:
        return MISSING
    if known[0][1] >= target:
        return f"fewer than {known[0][0]:,}"
    for (fewer, below), (more, above) in pairwise(known):
        if below < target <= above:
            share = (target - below) / (above - below)
            return f"{round(exp(log(fewer) + share * (log(more) - log(fewer)))):,}"
    return f"more than {known[-1][0]:,}"


def by_label(group: Iterable[Measurement]) -> dict[str, list[Measurement]]:
    """The rows of a table: measurements with the same label, in the order of the group."""
    rows: dict[str, list[Measurement]] = {}
    for measurement in group:
        rows.setdefault(measurement.label, []).append(measurement)
    return rows


def caption_scores(results: Results, group: Iterable[Measurement], metric: str = F1) -> list[float]:
    """One metric of captions, for each measurement that has results."""
    return [results[m.key][SPLIT][metric] for m in group if m.key in results]


def image_scores(results: Results, group: Iterable[Measurement], metric: str = F1) -> list[float]:
    """One metric of generated images, for each measurement that has results."""
    return [results[m.key][metric] for m in group if m.key in results]


def scores_by_pairs(results: Results, group: Iterable[Measurement]) -> dict[int, list[float]]:
    """Object and place F1 of captions, for each number of pairs that has results."""
    group = list(group)
    scores = {pairs: caption_scores(results, with_pairs(group, pairs)) for pairs in PAIRS}
    return {pairs: values for pairs, values in scores.items() if values}


def summary(results: Results) -> str:
    """One table: each claim, the paper's number and the miniature's."""

    def chain(rows: Iterable[Sequence[float]]) -> str:
        return " → ".join(number(mean(scores)) if scores else MISSING for scores in rows)

    def captions(*groups: Sequence[Measurement]) -> str:
        return chain(caption_scores(results, group) for group in groups)

    def images(group: Sequence[Measurement]) -> str:
        return chain(image_scores(results, row) for row in by_label(group).values())

    with_stage_1, without = (
        pairs_needed({pairs: mean(values) for pairs, values in scores_by_pairs(results, group).items()})
        for group in (measurements.STAGE_1, measurements.END_TO_END)
    )
    sizes = chain(image_scores(results, [m], "scale") for m in measurements.IMAGES_ONE_SEED)
    _, half, half_tail_drop = (
        number(results[m.key][str(measurements.HALF)][F1] if m.key in results else None)
        for m in measurements.TRUNCATION
    )
    nearest = results.get(measurements.NEAREST_TOKENS.key, {})
    named, by_chance = (
        number(nearest[image]["objects"] if image in nearest else None) for image in (SAME_IMAGE, ANOTHER_IMAGE)
    )
    rows = [
        [
            "stage 1 is needed",
            "FID of captions 51.03 without, 7.55 with",
            f"pairs for an F1 of 0.8: {with_stage_1} with; {without} without, in equal updates",
        ],
        [
            "more images give better reconstructions",
            "FID 9.01 → 7.57 → 7.22, 6 M to 40 M",
            f"{images(measurements.IMAGES)}, 30,000 to 240,000",
        ],
        [
            "more query tokens give better reconstructions",
            "FID 5.72 → 5.60 → 5.30, 16 to 77",
            f"{images(measurements.QUERY_TOKENS)}, 6 to 24",
        ],
        [
            "training the language model helps",
            "FID of captions 9.71 → 7.55",
            captions(measurements.PROJECTOR, measurements.PROJECTOR_AND_LANGUAGE_MODEL),
        ],
        [
            "training the encoder, too, helps",
            "FID of captions 7.55 → 6.64",
            captions(measurements.PROJECTOR_AND_LANGUAGE_MODEL, measurements.ALL_TRAINABLE),
        ],
        [
            "a larger language model writes better captions",
            "FID of captions 9.37 → 7.30 → 6.64",
            f"{captions(measurements.SMALL, measurements.MIDDLE, measurements.LARGE)}, at 1,000 pairs",
        ],
        [
            "more images give more exact positions",
            "centre off by .1625 → .0988",
            f"size off by {sizes}",
        ],
        [
            "the embeddings of two images compose",
            "images, no number",
            f"half of one image's embeddings: {half}, trained with tail drop {half_tail_drop}; of two: see below",
        ],
        [
            "caption embeddings are like language",
            "no number",
            f"object names found: {named}, by chance {by_chance}",
        ],
    ]
    return "## Summary\n\n" + (
        "F1 is of objects and their places, on combinations that no part was trained on. Each line is one of the "
        "tables below. The paper's numbers are at guidance 2.\n\n"
        + markdown_table(["the paper's claim", "its number", "here"], rows)
        + "\n"
    )


def data_efficiency(results: Results) -> str:
    """Table 7: is stage 1 needed?"""
    rows = []
    for label, group in by_label(measurements.DATA_EFFICIENCY).items():
        scores = scores_by_pairs(results, group)
        needed = pairs_needed({pairs: mean(values) for pairs, values in scores.items()})
        rows.append([label, *(spread(scores.get(pairs, [])) for pairs in PAIRS), needed])
    ours = markdown_table(["encoder", *(f"{pairs:,} pairs" for pairs in PAIRS), "pairs for 0.8"], rows)
    paper = markdown_table(
        ["language model", "stage 1", "FID of captions, guidance 1 / 2 / 3 / 4"],
        [
            ["Qwen2.5-0.5B", "no", "57.29 / 64.02 / 66.92 / 68.18"],
            ["Qwen2.5-1.5B", "no", "49.15 / 56.66 / 59.15 / 60.14"],
            ["Qwen2.5-3B", "no", "45.63 / 51.03 / 53.28 / 54.40"],
            ["Qwen2.5-3B", "yes, frozen", "12.22 / 7.55 / 9.58 / 10.84"],
        ],
    )
    return _section(
        "Is stage 1 needed? (table 7)",
        "Object and place F1 of captions of unseen combinations. All rows have the same language model and the same "
        "number of updates; one seed, or the mean of several and their range. In the last row the encoder is trained "
        "at a learning rate of 1e-3, too.",
        ours + _encoder_learning_rates(results),
        paper,
    )


def _encoder_learning_rates(results: Results) -> str:
    """Whether the encoder that is trained on the pairs fails because of its learning rate or of too few updates."""
    metrics = ("background", "object_f1", F1)
    rows = _score_rows(results, measurements.ENCODER_LEARNING_RATES, caption_scores, metrics)
    if not rows:
        return ""
    about = "The encoder that is trained on 20,000 pairs, at other learning rates of its own, and for more updates:"
    header = ["its learning rate, and updates", *(METRICS[metric] for metric in metrics)]
    return f"\n\n{about}\n\n{markdown_table(header, rows)}"


def images_seen(results: Results) -> str:
    """Table 5, left: images seen in stage 1."""
    paper = markdown_table(
        ["images (checkpoints of one run)", "FID of reconstructions, guidance 1 / 2 / 3 / 4"],
        [
            ["6 M", "11.38 / 9.01 / 10.33 / 10.81"],
            ["18 M", "10.14 / 7.57 / 8.41 / 8.78"],
            ["40 M", "9.71 / 7.22 / 7.70 / 7.84"],
        ],
    )
    ours = _score_table("images, one run each", results, measurements.IMAGES, image_scores)
    return _section("Images seen in stage 1 (table 5, left)", RECONSTRUCTIONS, ours, paper)


def language_model_size(results: Results) -> str:
    """Table 5, right: size of the language model."""
    ours = _score_table(
        "language model, 1,000 pairs", results, measurements.LANGUAGE_MODEL_SIZES, caption_scores, (F1, "exact")
    )
    paper = markdown_table(
        ["language model", "FID of captions, guidance 1 / 2 / 3 / 4"],
        [
            ["Qwen2.5-0.5B", "14.70 / 9.37 / 11.26 / 12.45"],
            ["Qwen2.5-1.5B", "12.25 / 7.30 / 9.16 / 10.26"],
            ["Qwen2.5-3B", "11.47 / 6.64 / 8.56 / 9.90"],
        ],
    )
    about = (
        "Captions of unseen combinations; mean of the seeds, and their range. Each language model was first trained "
        "on the same captions, and is given the embeddings of the same frozen encoder."
    )
    sizes = [caption_scores(results, group) for group in by_label(measurements.LANGUAGE_MODEL_SIZES).values()]
    if all(sizes) and max(map(mean, sizes)) > mean(sizes[-1]):
        about += (
            " The largest is not the best here. The cause was not measured; the learning rates were chosen with the "
            "middle one."
        )
    return _section("Size of the language model (table 5, right)", about, ours, paper)


def query_tokens(results: Results) -> str:
    """Table 4, left: number of query tokens."""
    ours = _score_table("query tokens, after 120,000 images", results, measurements.QUERY_TOKENS, image_scores)
    paper = markdown_table(
        ["query tokens", "FID of reconstructions"], [["16", "5.72"], ["32", "5.60"], ["77", "5.30"]]
    )
    numbers = [image_scores(results, group) for group in by_label(measurements.QUERY_TOKENS).values()]
    about = RECONSTRUCTIONS
    if all(numbers) and max(max(n) - min(n) for n in numbers) > abs(mean(numbers[-1]) - mean(numbers[0])):
        about += (
            " The seeds differ by more than the numbers of query tokens do, so these seeds are too few to decide "
            "which number is best."
        )
    return _section("Number of query tokens (table 4, left)", about, ours, paper)


def trainable_parts(results: Results) -> str:
    """Table 4, right: what is trained in stage 2."""
    ours = _score_table("trainable, 20,000 pairs", results, measurements.TRAINABLE_PARTS, caption_scores)
    paper = markdown_table(
        ["trainable", "FID of captions, guidance 1 / 2 / 3 / 4"],
        [
            ["projector", "14.27 / 9.71 / 11.87 / 13.22"],
            ["projector and language model", "12.22 / 7.55 / 9.58 / 10.84"],
            ["projector, language model and encoder", "11.47 / 6.64 / 8.56 / 9.90"],
        ],
    )
    about = (
        "Captions of unseen combinations; one seed, or the mean of several and their range. The encoder's learning "
        "rate is a thirtieth of the others', except in the row with one rate, which is 1e-3. In 300 scenes a "
        "difference of 0.005 is about three objects."
    )
    return _section("Trainable parts in stage 2 (table 4, right)", about, ours, paper)


def positions(results: Results) -> str:
    """Table 6: positions and sizes."""
    rows = []
    for measurement in [*measurements.IMAGES_ONE_SEED, measurements.TRUE_CAPTIONS]:
        if (found := results.get(measurement.key)) is not None:
            centre, scale, matched = number(found["centre"], 4), number(found["scale"], 4), number(found["matched"])
            rows.append([measurement.label, centre, scale, matched])
    ours = markdown_table(["images", "centre", "size", "objects compared"], rows) if rows else NOT_YET
    paper = markdown_table(
        ["images", "angle", "centre", "scale"],
        [
            ["8 M", ".1564", ".1625", ".1775"],
            ["18 M", ".1287", ".1498", ".1773"],
            ["34 M", ".1227", ".1402", ".1835"],
            ["40 M", ".1016", ".0988", ".1222"],
        ],
    )
    about = (
        "Mean distance between the centres, and mean difference of the sizes (square root of the area), of the same "
        "object in the image and in its reconstruction, as shares of the image's width; one seed. Objects are "
        "compared if the scene classifier finds them at the right place. In the images positions are jittered by up "
        "to 0.047 in each direction, sizes by 0.03."
    )
    return _section("Positions and sizes (table 6)", about, ours, paper)


def composition(results: Results) -> str:
    """Figure 6: truncation and composition."""
    parts = []
    truncated = {m.label: results[m.key] for m in measurements.TRUNCATION if m.key in results}
    if truncated:
        counts = sorted({int(count) for found in truncated.values() for count in found})
        rows = [
            [label, *(f"{found[str(n)][F1]:.2f} / {found[str(n)]['background']:.2f}" for n in counts)]
            for label, found in truncated.items()
        ]
        parts.append("Object + place F1 / background accuracy of images from the first embeddings alone, of 24:\n")
        parts.append(markdown_table(["stage 1", *map(str, counts)], rows))
    for title, group in (
        ("Two images", measurements.COMPOSITION),
        ("Two images of one object each, at different places", measurements.SINGLE_OBJECTS),
    ):
        for measurement in group:
            if found := results.get(measurement.key):
                rows = [[mixed, *map(number, shares.values())] for mixed, shares in found.items()]
                parts.append(f"\n{title}, the first embeddings of each, {measurement.label}:\n")
                parts.append(markdown_table(["embeddings", *next(iter(found.values()))], rows))
    about = (
        "The paper composes two images by truncating their embeddings and concatenating the rest, and shows the "
        "results as images. Here the scene classifier counts what remains of each. With tail drop, half of all "
        "batches of stage 1 show the denoiser only the first few embeddings (as ViLex does)."
    )
    return _section("Composition (figure 6)", about, "\n".join(parts) or NOT_YET)


def likeness_to_language(results: Results) -> str:
    """Are caption embeddings like language?"""
    parts = []
    if found := results.get(measurements.TOKEN_EMBEDDINGS.key):
        parts.append("Captions, when the language model is given:\n")
        parts.append(_metrics_table("given", found))
    if found := results.get(measurements.NEAREST_TOKENS.key):
        rows = [[name, *map(number, shares.values())] for name, shares in found.items()]
        parts.append(
            "\nShare of true words that are the nearest token of one of the 24 embeddings (the encoder was trained on "
            "no words):\n"
        )
        parts.append(markdown_table(["true of", *next(iter(found.values()))], rows))
    rows = []
    for measurement in measurements.GENERATED_FROM:
        if (scores := results.get(measurement.key)) is not None:
            f1, exact = number(scores[F1]), number(scores["exact"])
            rows.append([measurement.label, f1, exact, number(scores["centre"], 4), number(scores["scale"], 4)])
    if rows:
        parts.append("\nImages, when the denoiser is given:\n")
        parts.append(markdown_table(["given", METRICS[F1], METRICS["exact"], "centre off by", "size off by"], rows))
    about = (
        "The captioner was trained on caption embeddings, never on words. Here it is given the text encoder's token "
        "embeddings of the true caption instead, and the denoiser is given the true caption instead of caption "
        "embeddings."
    )
    return _section("Are caption embeddings like language?", about, "\n".join(parts) or NOT_YET)


def out_of_distribution(results: Results) -> str:
    """Results on artwork that nothing was trained on."""
    found = results.get(measurements.OUT_OF_DISTRIBUTION.key)
    about = (
        "The same scenes with another artist's artwork (Noto Color Emoji). Backgrounds and places are recognised; "
        "objects are taken for ones that the model knows. Reconstructions of photographs are scenes of the "
        "miniature's own world. No target is set for these scores.\n\n"
        "![Noto artwork and photographs, their reconstructions and their captions](out_of_distribution.png)\n\n"
        "*Originals, with the reconstruction and the caption of each below it. "
        "`python -m vlv.miniature.paper.out_of_distribution --output DIR`, then `vlv caption` and "
        "`vlv reconstruct --sheet` of DIR and [`examples/photos`](../examples/photos).*"
    )
    return _section("Out of distribution", about, _metrics_table("", found) if found else NOT_YET)


Scores = Callable[[Results, Iterable[Measurement], str], list[float]]  # `caption_scores` or `image_scores`


def _score_rows(
    results: Results, group: Sequence[Measurement], scores: Scores, metrics: Sequence[str]
) -> list[list[str]]:
    """One row for each label with results: the label, and the spread of each metric over the seeds."""
    return [
        [label, *(spread(scores(results, row, metric)) for metric in metrics)]
        for label, row in by_label(group).items()
        if scores(results, row, metrics[0])
    ]


def _score_table(
    title: str,
    results: Results,
    group: Sequence[Measurement],
    scores: Scores,
    metrics: Sequence[str] = ("background", F1, "exact"),
) -> str:
    rows = _score_rows(results, group, scores, metrics)
    return markdown_table([title, *(METRICS[metric] for metric in metrics)], rows) if rows else NOT_YET


def _metrics_table(title: str, found: Mapping[str, Mapping[str, float]]) -> str:
    """A table of one measurement that scores several things: one row for each."""
    metrics = ("background", "object_f1", F1, "exact")
    rows = [[name, *(number(scores[metric]) for metric in metrics)] for name, scores in found.items()]
    return markdown_table([title, *(METRICS[metric] for metric in metrics)], rows)


def _section(title: str, about: str, ours: str, paper: str | None = None) -> str:
    text = f"## {title}\n\n{about}\n\n{ours}\n"
    return text if paper is None else f"{text}\nThe paper's:\n\n{paper}\n"


def report(results: Results, introduction: str) -> str:
    """The page.

    Args:
        results: By the keys of their measurements. Tables without results say so.
        introduction: The text before the tables.
    """
    sections = (
        summary,
        data_efficiency,
        trainable_parts,
        images_seen,
        language_model_size,
        query_tokens,
        positions,
        composition,
        likeness_to_language,
        out_of_distribution,
    )
    return introduction.rstrip() + "\n\n" + "\n".join(section(results) for section in sections)
