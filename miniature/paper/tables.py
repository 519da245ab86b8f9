"""The paper's tables beside what was measured in the small world: `docs/paper_in_miniature.md`.

Takes measurements by name (`vlv.miniature.paper` makes them) and knows nothing of how they came about. The
paper's figures are those of arXiv 2507.07104 v2; its FID of photographs and this world's exact scores are different
things, so what can be compared is which way a figure goes, and how far.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import exp, log
from statistics import mean
from typing import Any

Measured = Mapping[str, Mapping[str, Any]]
PAIRS = (200, 1_000, 5_000, 20_000)
SEEDS = (0, 1, 2)
SPLIT = "combo"
NONE = "–"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def number(value: float | None, digits: int = 3) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def spread(values: Sequence[float]) -> str:
    """A mean, and from where to where it is one of several."""
    if not values:
        return NONE
    if len(values) == 1:
        return number(values[0])
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def pairs_needed(scores: Mapping[int, float], wanted: float = 0.8) -> str:
    """Pairs at which a score first reaches `wanted`, interpolated between the logarithms of what was tried."""
    known = sorted(scores.items())
    if not known:
        return NONE
    if known[0][1] >= wanted:
        return f"fewer than {known[0][0]:,}"
    for (fewer, below), (more, above) in pairwise(known):
        if below < wanted <= above:
            share = (wanted - below) / (above - below)
            return f"{round(exp(log(fewer) + share * (log(more) - log(fewer)))):,}"
    return f"more than {known[-1][0]:,}"


def scores_by_pairs(measured: Measured, origin: str, seeds: Sequence[int] = SEEDS) -> dict[int, list[float]]:
    """Object and place F1 of captions, of as many seeds as were measured, by the number of pairs."""
    return {pairs: scores_of_seeds(measured, f"table 7, {origin}, {pairs} pairs", seeds) for pairs in PAIRS}


def scores_of_seeds(
    measured: Measured, name: str, seeds: Sequence[int] = SEEDS, key: str = "object_place_f1"
) -> list[float]:
    """One figure of captions, of as many seeds as were measured."""
    names = [f"{name}, seed {seed}" for seed in seeds]
    return [measured[name][SPLIT][key] for name in names if name in measured]


def scores_of_reconstructions(measured: Measured, name: str, key: str) -> list[float]:
    """One figure of the pictures of an encoder, and of the same with other seeds where there are some."""
    names = [name, *(f"{name}-seed-{seed}" for seed in SEEDS[1:])]
    return [measured[found][key] for found in names if found in measured]


def summary(measured: Measured) -> str:
    """Each claim, the paper's figure and this world's, in one table."""

    def score(name: str, *keys: str) -> str:
        value: Any = measured.get(name)
        for key in keys:
            value = None if value is None else value.get(key)
        return number(value)

    def chain(names: Sequence[str], *keys: str) -> str:
        return " → ".join(score(name, *keys) for name in names)

    def means(found: Sequence[Sequence[float]]) -> str:
        return " → ".join(number(mean(scores)) if scores else NONE for scores in found)

    def pictures(names: Sequence[str]) -> str:
        return means([scores_of_reconstructions(measured, name, f1) for name in names])

    def captions(names: Sequence[str]) -> str:
        return means([scores_of_seeds(measured, name) for name in names])

    needed = []
    for origin in ORIGINS.values():
        by_pairs = scores_by_pairs(measured, origin)
        needed.append(pairs_needed({pairs: mean(values) for pairs, values in by_pairs.items() if values}))
    f1 = "object_place_f1"
    nearest = [score("words, nearest", whose, "objects") for whose in ("of the picture", "by chance")]
    both = [score(f"figure 6, truncation, {name}", "12", f1) for name in LAST_TWO]
    rows = [
        [
            "stage 1 is needed",
            "FID of captions 51.03 without, 7.55 with",
            f"pairs for an F1 of 0.8: {needed[0]} with; {needed[2]} without, in equal updates",
        ],
        [
            "more images, better pictures",
            "FID 9.01 → 7.57 → 7.22, 6 M to 40 M",
            f"{pictures(list(IMAGES.values()))}, 30,000 to 240,000",
        ],
        ["more queries, better pictures", "FID 5.72 → 5.60 → 5.30, 16 to 77", f"{pictures(QUERIES)}, 6 to 24"],
        ["the language model must learn, too", "FID of captions 9.71 → 7.55", captions(LEARNING[:2])],
        ["it helps if the encoder goes on learning", "FID of captions 7.55 → 6.64", captions(LEARNING[1:])],
        [
            "a larger language model reads better",
            "FID of captions 9.37 → 7.30 → 6.64",
            f"{captions(list(SIZES.values()))}, at 1,000 pairs",
        ],
        [
            "more images, things more where they were",
            "centre off by .1625 → .0988",
            f"size off by {chain(list(IMAGES.values()), 'scale')}",
        ],
        [
            "two images' embeddings compose",
            "pictures, no figure",
            f"half of one's embeddings: {both[0]}, trained with tail drop {both[1]}; of two: see below",
        ],
        [
            "caption embeddings are like language",
            "no figure",
            f"object names found: {nearest[0]}, by chance {nearest[1]}",
        ],
    ]
    return "## In short\n\n" + (
        "F1 is of objects and their places, on combinations that nothing was trained on; each line is one of the "
        "tables below. The paper's figures at guidance 2.\n\n"
        + table(["the paper says", "its figure", "here"], rows)
        + "\n"
    )


def table_7(measured: Measured) -> str:
    """Is stage 1 needed?"""
    rows = []
    for label, origin in ORIGINS.items():
        by_pairs = scores_by_pairs(measured, origin)
        means = {pairs: mean(values) for pairs, values in by_pairs.items() if values}
        rows.append([label, *(spread(by_pairs[pairs]) for pairs in PAIRS), pairs_needed(means)])
    ours = table(["encoder", *(f"{pairs:,} pairs" for pairs in PAIRS), "pairs for 0.8"], rows)
    paper = table(
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
        "Object and place F1 of captions of unseen combinations. One language model, the same updates; mean of the "
        "seeds, and their range where there are several. In the last row the encoder learns at 1e-3, too.",
        ours + _fairness(measured),
        paper,
    )


def _fairness(measured: Measured) -> str:
    """Whether the encoder that learns from the pairs failed for its learning rate, or for want of time."""
    rows = []
    for label, name in FAIRNESS.items():
        if name in measured:
            scores = measured[name][SPLIT]
            rows.append([label, *(number(scores[key]) for key in ("background", "object_f1", "object_place_f1"))])
    if not rows:
        return ""
    about = "The encoder that learns from 20,000 pairs, at other learning rates of its own, and for longer:"
    return f"\n\n{about}\n\n" + table(["its rate, and updates", "background", "object F1", "object + place F1"], rows)


def reconstructions(measured: Measured, names: Mapping[str, str], header: str) -> str:
    """Of each name, and of the same with other seeds where there are some."""
    rows = []
    for label, name in names.items():
        keys = ("background", "object_place_f1", "exact")
        found = [scores_of_reconstructions(measured, name, key) for key in keys]
        if any(found):
            rows.append([label, *(spread(scores) for scores in found)])
    return table([header, "background", "object + place F1", "exact scene"], rows) if rows else _not_yet()


def table_5_images(measured: Measured) -> str:
    """Images seen in stage 1."""
    ours = reconstructions(measured, IMAGES, "images, each its own schedule")
    paper = table(
        ["images (checkpoints of one run)", "FID of reconstructions, guidance 1 / 2 / 3 / 4"],
        [
            ["6 M", "11.38 / 9.01 / 10.33 / 10.81"],
            ["18 M", "10.14 / 7.57 / 8.41 / 8.78"],
            ["40 M", "9.71 / 7.22 / 7.70 / 7.84"],
        ],
    )
    return _section("Images seen in stage 1 (table 5, left)", RECONSTRUCTIONS, ours, paper)


def table_5_language_model(measured: Measured) -> str:
    """Size of the language model."""
    rows, averages = [], []
    for label, name in SIZES.items():
        found = [measured[key][SPLIT] for seed in SEEDS if (key := f"{name}, seed {seed}") in measured]
        if found:
            averages.append(mean(scores["object_place_f1"] for scores in found))
            rows.append([label, *(spread([scores[key] for scores in found]) for key in ("object_place_f1", "exact"))])
    ours = table(["language model, 1,000 pairs", "object + place F1", "exact scene"], rows) if rows else _not_yet()
    paper = table(
        ["language model", "FID of captions, guidance 1 / 2 / 3 / 4"],
        [
            ["Qwen2.5-0.5B", "14.70 / 9.37 / 11.26 / 12.45"],
            ["Qwen2.5-1.5B", "12.25 / 7.30 / 9.16 / 10.26"],
            ["Qwen2.5-3B", "11.47 / 6.64 / 8.56 / 9.90"],
        ],
    )
    about = (
        "Captions of unseen combinations; mean of the seeds, and their range. Each was trained on the same captions "
        "first, and reads the same frozen encoder."
    )
    if len(rows) == len(SIZES) and max(averages) > averages[-1]:
        about += (
            " The largest is not the best here. Why was not measured; the learning rates were chosen with the middle "
            "one."
        )
    return _section("Size of the language model (table 5, right)", about, ours, paper)


def table_4_queries(measured: Measured) -> str:
    """Number of queries."""
    names = dict(zip(("6", "12", "24"), QUERIES, strict=True))
    ours = reconstructions(measured, names, "queries, after 120,000 images")
    paper = table(["queries", "FID of reconstructions"], [["16", "5.72"], ["32", "5.60"], ["77", "5.30"]])
    found = [scores_of_reconstructions(measured, name, "object_place_f1") for name in QUERIES]
    about = RECONSTRUCTIONS
    if all(found) and max(max(scores) - min(scores) for scores in found) > abs(mean(found[-1]) - mean(found[0])):
        about += " Seeds differ by more than numbers of queries do: so few of each do not decide which number is best."
    return _section("Number of queries (table 4, left)", about, ours, paper)


def table_4_learning(measured: Measured) -> str:
    """What is trained in stage 2."""
    names = dict(zip(("projector", "projector and language model", "these and the encoder"), LEARNING, strict=True))
    names["these and the encoder, all at one rate"] = "table 4, everything at one rate learns"
    keys = ("background", "object_place_f1", "exact")
    rows = [
        [label, *(spread(scores_of_seeds(measured, name, key=key)) for key in keys)]
        for label, name in names.items()
        if scores_of_seeds(measured, name)
    ]
    ours = table(["what learns, 20,000 pairs", "background", "object + place F1", "exact scene"], rows) if rows else ""
    paper = table(
        ["what learns", "FID of captions, guidance 1 / 2 / 3 / 4"],
        [
            ["projector", "14.27 / 9.71 / 11.87 / 13.22"],
            ["projector and language model", "12.22 / 7.55 / 9.58 / 10.84"],
            ["these and the encoder", "11.47 / 6.64 / 8.56 / 9.90"],
        ],
    )
    about = (
        "Captions of unseen combinations; one seed, or the mean of several and their range. The encoder learns at a "
        "thirtieth of the others' rate, except in the row that says one rate, which is 1e-3. Of 300 scenes a "
        "difference of 0.005 is about three objects."
    )
    return _section("What learns in stage 2 (table 4, right)", about, ours or _not_yet(), paper)


def table_6(measured: Measured) -> str:
    """Where things are."""
    rows = []
    names = {**IMAGES, "the true caption, no image": "words, teacher"}
    for label, name in names.items():
        if (found := measured.get(name)) is not None:
            rows.append([label, number(found["centre"], 4), number(found["scale"], 4), number(found["matched"])])
    ours = table(["images", "centre", "size", "objects compared"], rows) if rows else _not_yet()
    paper = table(
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
        "object in the picture and in its reconstruction, in widths of the picture; objects that the "
        "scene classifier finds at the right place; one seed. Positions here are jittered by up to 0.047 each way, sizes by "
        "0.03."
    )
    return _section("Where things are (table 6)", about, ours, paper)


def figure_6(measured: Measured) -> str:
    """Truncation and composition."""
    encoders = {
        "240,000 images": "encoder",
        "120,000 images": "encoder-120k",
        "120,000 images, tail drop": "encoder-tail-drop",
    }
    cut = {
        label: found
        for label, name in encoders.items()
        if (found := measured.get(f"figure 6, truncation, {name}")) is not None
    }
    parts = []
    if cut:
        counts = sorted({int(count) for found in cut.values() for count in found})
        rows = [
            [label, *(f"{found[str(c)]['object_place_f1']:.2f} / {found[str(c)]['background']:.2f}" for c in counts)]
            for label, found in cut.items()
        ]
        parts.append("Object + place F1 / background accuracy of pictures from the first so many of 24 embeddings:\n")
        parts.append(table(["stage 1", *map(str, counts)], rows))
    kinds = {"composition": "Two pictures", "single objects": "Two pictures of one object each, at different places"}
    for kind, title in kinds.items():
        for label, name in encoders.items():
            if found := measured.get(f"figure 6, {kind}, {name}"):
                rows = [[mixed, *(number(value) for value in figures.values())] for mixed, figures in found.items()]
                parts.append(f"\n{title}, first so many of each, {label}:\n")
                parts.append(table(["tokens", *next(iter(found.values()))], rows))
    about = (
        "The paper mixes two images by cutting the tails of their embeddings and joining the rest, and shows "
        "pictures. Here the scene classifier counts what survives. With tail drop, half of all batches of stage 1 show the "
        "denoiser only the first few embeddings (as ViLex does)."
    )
    return _section("Composition (figure 6)", about, "\n".join(parts) or _not_yet(), None)


def likeness(measured: Measured) -> str:
    """Does z behave like language?"""
    parts = []
    if found := measured.get("words, captions"):
        keys = ("background", "object_f1", "object_place_f1", "exact")
        rows = [[name, *(number(scores[key]) for key in keys)] for name, scores in found.items()]
        parts.append("Captions, when the language model is given:\n")
        parts.append(table(["given", "background", "object F1", "object + place F1", "exact scene"], rows))
    if found := measured.get("words, nearest"):
        rows = [[name, *(number(value) for value in shares.values())] for name, shares in found.items()]
        parts.append(
            "\nShare of what is true that is the nearest word of one of the 24 vectors (no word was ever shown):\n"
        )
        parts.append(table(["true of", *next(iter(found.values()))], rows))
    pictures = {"caption embeddings of the picture": "reconstructions, encoder", "its true caption": "words, teacher"}
    if any(name in measured for name in pictures.values()):
        rows = [
            [
                label,
                *(number(measured[name][key]) for key in ("object_place_f1", "exact")),
                *(number(measured[name][key], 4) for key in ("centre", "scale")),
            ]
            for label, name in pictures.items()
            if name in measured
        ]
        parts.append("\nPictures, when the denoiser is given:\n")
        parts.append(table(["given", "object + place F1", "exact scene", "centre off by", "size off by"], rows))
    about = (
        "The captioner never saw a word at its input. It is given the text encoder's own embeddings of the words of "
        "the true caption in place of caption embeddings, and the other way round."
    )
    return _section("Are caption embeddings like language?", about, "\n".join(parts) or _not_yet(), None)


def strangers(measured: Measured) -> str:
    """What happens out of distribution."""
    rows = []
    for name, scores in (measured.get("another style") or {}).items():
        keys = ("background", "object_f1", "object_place_f1", "exact")
        rows.append([name, *(number(scores[key]) for key in keys)])
    ours = table(["", "background", "object F1", "object + place F1", "exact scene"], rows) if rows else _not_yet()
    about = (
        "The same scenes in another artist's drawings (Noto Color Emoji). Backgrounds and places are seen, drawings "
        "are taken for those that it knows; of photographs it makes scenes of its own world. There is no aim here.\n\n"
        "![Noto drawings and photographs, what they become, and what is said of them](out_of_distribution.png)\n\n"
        "*Originals, below each its reconstruction, and its caption. `python -m vlv.miniature.paper.out_of_distribution --output "
        "DIR`, then `vlv caption` and `vlv reconstruct --sheet` of DIR and [`examples/photos`](../examples/photos).*"
    )
    return _section("Pictures that no one here drew", about, ours, None)


ORIGINS = {
    "stage 1, then frozen": "stage 1",
    "untrained, frozen": "untrained",
    "untrained, learns from the pairs": "end to end",
}
LONGER = "table 7, end to end at a tenth, 20000 pairs, 3200 updates"
FAIRNESS = {
    "1e-3, as the language model, 800": "table 7, end to end, 20000 pairs, seed 0",
    "a tenth of it, 800": "table 7, end to end at a tenth, 20000 pairs, seed 0",
    "a thirtieth of it, 800": "table 7, end to end at a thirtieth, 20000 pairs, seed 0",
    "a tenth of it, 3,200": LONGER,
}
IMAGES = {
    "30,000": "reconstructions, encoder-30k",
    "60,000": "reconstructions, encoder-60k",
    "120,000": "reconstructions, encoder-120k",
    "240,000": "reconstructions, encoder",
}
QUERIES = (
    "reconstructions, encoder-6-queries",
    "reconstructions, encoder-12-queries",
    "reconstructions, encoder-120k",
)
LEARNING = (
    "table 4, projector learns",
    "table 7, stage 1, 20000 pairs",
    "table 4, everything learns",
)
SIZES = {
    "64 wide, 2 layers": "table 5, small language model",
    "128 wide, 3 layers": "table 7, stage 1, 1000 pairs",
    "192 wide, 4 layers": "table 5, large language model",
}
LAST_TWO = ("encoder-120k", "encoder-tail-drop")
RECONSTRUCTIONS = (
    "Reconstructions of unseen combinations, guidance 2, read by the scene classifier; one seed, or the mean of several "
    "and their range."
)


def _not_yet() -> str:
    return "*Not measured yet.*"


def _section(title: str, about: str, ours: str, paper: str | None) -> str:
    text = f"## {title}\n\n{about}\n\n{ours}\n"
    return text if paper is None else f"{text}\nThe paper's:\n\n{paper}\n"


def report(measured: Measured, introduction: str) -> str:
    """The whole page.

    Args:
        measured: Figures by the name of their measurement; what is missing is said to be.
        introduction: What stands before the tables.
    """
    sections = (
        summary,
        table_7,
        table_4_learning,
        table_5_images,
        table_5_language_model,
        table_4_queries,
        table_6,
        figure_6,
        likeness,
        strangers,
    )
    return introduction.rstrip() + "\n\n" + "\n".join(section(measured) for section in sections)
