"""The measurements behind the paper's tables: what to run, how long it takes, and which table row shows the result.

`runner` runs `MEASUREMENTS`; `tables` and `plots` look results up by key. Keys are defined only here. Each group
is what one table shows. Measurements of a group with the same label are one row, measured with several seeds.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlv import hub

from ..encoder import NUM_QUERY_TOKENS
from ..evaluation import SCENE_CLASSIFIER_FILE
from ..language_model import LAYERS, WIDTH
from ..scene_classifier import SceneClassifier
from .data_efficiency import LEARNING_RATE, UPDATES, measure_captioner, untrained_encoder
from .embedding_probes import (
    measure_composition,
    measure_nearest_tokens,
    measure_reconstructions,
    measure_token_embeddings,
    measure_true_captions,
    measure_truncation,
)
from .out_of_distribution import measure_out_of_distribution

TEACHER, CAPTIONER = "teacher-3", "captioner"  # folders below ROOT
SEEDS = (0, 1, 2)
PAIRS = (200, 1_000, 5_000, 20_000)
FEW_PAIRS = 1_000  # captions after stage 1 become good between 200 pairs and this number
ALL_PAIRS = max(PAIRS)
HALF = NUM_QUERY_TOKENS // 2
KEPT = (4, 8, HALF, 16, 20, NUM_QUERY_TOKENS)  # of an image's embeddings, for truncation
MIXED = ((24, 0), (24, 24), (24, 12), (12, 24), (12, 12), (18, 6), (6, 18))  # of two images', for composition


@dataclass(frozen=True)
class Encoder:
    """An encoder of stage 1, in `folder` below ROOT, with the settings of its training."""

    folder: str
    images: int
    num_query_tokens: int = NUM_QUERY_TOKENS
    tail_drop: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class LanguageModel:
    """A language model, in `folder` below ROOT, with its size."""

    folder: str
    width: int
    layers: int


@dataclass(frozen=True)
class Measurement:
    """One measurement.

    Attributes:
        key: Its name in files, in the report's JSON and in `--only`.
        label: Of the table row that shows it.
        run: Called with ROOT and `settings`; returns the results.
        minutes: In one process beside another, on two virtual cores of one physical core.
    """

    key: str
    label: str
    run: Callable[..., dict[str, Any]]
    minutes: int
    settings: dict[str, Any] = field(default_factory=dict)


# Parts that the measurements compare. The recipe trains the variants for the tables only.

ENCODER = Encoder("encoder", images=240_000)
ENCODER_120K = Encoder("encoder-120k", images=120_000)
ENCODER_TAIL_DROP = Encoder("encoder-tail-drop", images=120_000, tail_drop=0.5)
ENCODER_VARIANTS = [
    Encoder("encoder-30k", images=30_000),
    Encoder("encoder-60k", images=60_000),
    ENCODER_120K,
    ENCODER_TAIL_DROP,
    Encoder("encoder-6-queries", images=120_000, num_query_tokens=6),
    Encoder("encoder-12-queries", images=120_000, num_query_tokens=12),
    # Two more seeds for each number of query tokens, because the order of the results depends on the seed.
    Encoder("encoder-120k-seed-1", images=120_000, seed=1),
    Encoder("encoder-120k-seed-2", images=120_000, seed=2),
    Encoder("encoder-6-queries-seed-1", images=120_000, num_query_tokens=6, seed=1),
    Encoder("encoder-6-queries-seed-2", images=120_000, num_query_tokens=6, seed=2),
    Encoder("encoder-12-queries-seed-1", images=120_000, num_query_tokens=12, seed=1),
    Encoder("encoder-12-queries-seed-2", images=120_000, num_query_tokens=12, seed=2),
]
ENCODERS = [ENCODER, *ENCODER_VARIANTS]

LANGUAGE_MODEL = LanguageModel("language-model", WIDTH, LAYERS)
SMALL_LANGUAGE_MODEL = LanguageModel("language-model-small", width=64, layers=2)
LARGE_LANGUAGE_MODEL = LanguageModel("language-model-large", width=192, layers=4)


# What a measurement runs: each function loads parts from ROOT and measures them.


def run_captioner(
    root: Path,
    pairs: int,
    seed: int,
    stage_1: bool = True,
    language_model: LanguageModel = LANGUAGE_MODEL,
    **training: Any,
) -> dict[str, Any]:
    """A captioner with the encoder of stage 1, or with an untrained one; `training` as in `measure_captioner`."""
    encoder = hub.load_encoder(root / ENCODER.folder)[0] if stage_1 else untrained_encoder(root / TEACHER, seed)
    return measure_captioner(encoder, root / language_model.folder, pairs, seed=seed, **training)


def run_reconstructions(root: Path, encoder: Encoder) -> dict[str, Any]:
    return measure_reconstructions(*_load_encoder_and_teacher(root, encoder))


def run_truncation(root: Path, encoder: Encoder) -> dict[str, Any]:
    return measure_truncation(*_load_encoder_and_teacher(root, encoder), kept=KEPT)


def run_composition(root: Path, encoder: Encoder, single: bool) -> dict[str, Any]:
    return measure_composition(*_load_encoder_and_teacher(root, encoder), counts=MIXED, single=single)


def run_out_of_distribution(root: Path) -> dict[str, Any]:
    captioner, processor = hub.load_captioner(root / CAPTIONER)
    return measure_out_of_distribution(captioner, processor, root / TEACHER, _load_scene_classifier(root))


def run_true_captions(root: Path) -> dict[str, Any]:
    return measure_true_captions(root / TEACHER, _load_scene_classifier(root))


def run_token_embeddings(root: Path) -> dict[str, Any]:
    return measure_token_embeddings(*hub.load_captioner(root / CAPTIONER), root / TEACHER)


def run_nearest_tokens(root: Path) -> dict[str, Any]:
    return measure_nearest_tokens(hub.load_encoder(root / ENCODER.folder)[0], root / TEACHER)


def _load_encoder_and_teacher(root: Path, encoder: Encoder) -> tuple[Any, Path, SceneClassifier]:
    return hub.load_encoder(root / encoder.folder)[0], root / TEACHER, _load_scene_classifier(root)


def _load_scene_classifier(root: Path) -> SceneClassifier:
    return SceneClassifier.load(root / SCENE_CLASSIFIER_FILE)


def captioners(
    key: str, label: str, minutes: int, seeds: Iterable[int] = SEEDS[:1], **settings: Any
) -> list[Measurement]:
    """One captioner for each seed."""
    return [
        Measurement(f"{key}, seed {seed}", label, run_captioner, minutes, {"seed": seed, **settings}) for seed in seeds
    ]


def reconstructions(encoder: Encoder, label: str) -> Measurement:
    return Measurement(f"reconstructions, {encoder.folder}", label, run_reconstructions, 1, {"encoder": encoder})


def with_label(measurements: Iterable[Measurement], label: str) -> list[Measurement]:
    """The same measurements under the label that they have in another table."""
    return [replace(measurement, label=label) for measurement in measurements]


def with_pairs(measurements: Iterable[Measurement], pairs: int) -> list[Measurement]:
    """Those of the measurements that train on this number of pairs."""
    return [measurement for measurement in measurements if measurement.settings["pairs"] == pairs]


# Table 7: is stage 1 needed?

STAGE_1 = [
    measurement
    for pairs in PAIRS
    # Three seeds where few pairs are enough, and with all pairs, which table 4 compares.
    for seeds in [SEEDS if pairs <= FEW_PAIRS or pairs == ALL_PAIRS else SEEDS[:1]]
    for measurement in captioners(
        f"table 7, encoder of stage 1, {pairs} pairs", "stage 1, then frozen", 5, seeds, pairs=pairs
    )
]
UNTRAINED = [
    measurement
    for pairs in PAIRS
    for measurement in captioners(
        f"table 7, untrained encoder, frozen, {pairs} pairs", "untrained, frozen", 6, pairs=pairs, stage_1=False
    )
]
END_TO_END = [
    measurement
    for pairs in PAIRS
    for measurement in captioners(
        f"table 7, untrained encoder, trainable, {pairs} pairs",
        "untrained, trained on the pairs",
        19,
        pairs=pairs,
        stage_1=False,
        trainable="all",
    )
]
DATA_EFFICIENCY = [*STAGE_1, *UNTRAINED, *END_TO_END]

# Does the encoder that is trained on the pairs fail because of its learning rate, or because of too few updates?

LOWER_LEARNING_RATES = [
    measurement
    for share, rate in (("a tenth", LEARNING_RATE / 10), ("a thirtieth", LEARNING_RATE / 30))
    for measurement in captioners(
        f"table 7, untrained encoder, trainable at {share} of the learning rate, {ALL_PAIRS} pairs",
        f"{share} of it, {UPDATES}",
        19,
        pairs=ALL_PAIRS,
        stage_1=False,
        trainable="all",
        encoder_learning_rate=rate,
    )
]
MORE_UPDATES = captioners(
    f"table 7, untrained encoder, trainable at a tenth of the learning rate, {ALL_PAIRS} pairs, {4 * UPDATES} updates",
    f"a tenth of it, {4 * UPDATES:,}",
    70,
    pairs=ALL_PAIRS,
    stage_1=False,
    trainable="all",
    updates=4 * UPDATES,
    encoder_learning_rate=LEARNING_RATE / 10,
)
ENCODER_LEARNING_RATES = [
    *with_label(with_pairs(END_TO_END, ALL_PAIRS), f"1e-3, as the language model, {UPDATES}"),
    *LOWER_LEARNING_RATES,
    *MORE_UPDATES,
]

# Table 4, right: what is trained in stage 2.

PROJECTOR = captioners("table 4, projector trainable", "projector", 6, pairs=ALL_PAIRS, trainable="projector")
PROJECTOR_AND_LANGUAGE_MODEL = with_label(with_pairs(STAGE_1, ALL_PAIRS), "projector and language model")
ALL_TRAINABLE = captioners(
    "table 4, all trainable",
    "projector, language model and encoder",
    24,
    SEEDS,
    pairs=ALL_PAIRS,
    trainable="all",
    encoder_learning_rate=LEARNING_RATE / 30,  # at the full rate an encoder that stage 1 trained fails
)
ONE_LEARNING_RATE = captioners(
    "table 4, all trainable at one learning rate",
    "the same, all at one learning rate",
    24,
    pairs=ALL_PAIRS,
    trainable="all",
    encoder_learning_rate=LEARNING_RATE,
)
TRAINABLE_PARTS = [*PROJECTOR, *PROJECTOR_AND_LANGUAGE_MODEL, *ALL_TRAINABLE, *ONE_LEARNING_RATE]

# Table 5, right: size of the language model, on few pairs, where the sizes differ.


def _size(language_model: LanguageModel) -> str:
    return f"{language_model.width} wide, {language_model.layers} layers"


SMALL = captioners(
    "table 5, small language model",
    _size(SMALL_LANGUAGE_MODEL),
    4,
    SEEDS,
    pairs=FEW_PAIRS,
    language_model=SMALL_LANGUAGE_MODEL,
)
MIDDLE = with_label(with_pairs(STAGE_1, FEW_PAIRS), _size(LANGUAGE_MODEL))
LARGE = captioners(
    "table 5, large language model",
    _size(LARGE_LANGUAGE_MODEL),
    9,
    SEEDS,
    pairs=FEW_PAIRS,
    language_model=LARGE_LANGUAGE_MODEL,
)
LANGUAGE_MODEL_SIZES = [*SMALL, *MIDDLE, *LARGE]

# Table 5, left: images seen in stage 1. Table 4, left: number of query tokens.

IMAGES = [
    reconstructions(encoder, f"{encoder.images:,}")
    for encoder in sorted(ENCODERS, key=lambda encoder: encoder.images)
    if encoder.num_query_tokens == NUM_QUERY_TOKENS and not encoder.tail_drop
]
QUERY_TOKENS = [
    reconstructions(encoder, str(encoder.num_query_tokens))
    for encoder in sorted(ENCODERS, key=lambda encoder: encoder.num_query_tokens)
    if encoder.images == ENCODER_120K.images and not encoder.tail_drop
]

# Table 6: positions. One seed of each number of images, and the teacher's images of true captions.

IMAGES_ONE_SEED = [measurement for measurement in IMAGES if measurement.settings["encoder"].seed == 0]
TRUE_CAPTIONS = Measurement("images from true captions", "the true caption, no image", run_true_captions, 1)

# Figure 6: truncation and composition.

PROBED_ENCODERS = (ENCODER, ENCODER_120K, ENCODER_TAIL_DROP)


def probe(key: str, encoder: Encoder, run: Callable[..., dict[str, Any]], **settings: Any) -> Measurement:
    label = f"{encoder.images:,} images" + (", tail drop" if encoder.tail_drop else "")
    return Measurement(f"figure 6, {key}, {encoder.folder}", label, run, 3, {"encoder": encoder, **settings})


TRUNCATION = [probe("truncation", encoder, run_truncation) for encoder in PROBED_ENCODERS]
COMPOSITION = [probe("composition", encoder, run_composition, single=False) for encoder in PROBED_ENCODERS]
SINGLE_OBJECTS = [probe("single objects", encoder, run_composition, single=True) for encoder in PROBED_ENCODERS]

# Not in the paper.

OUT_OF_DISTRIBUTION = Measurement("out of distribution", "Noto Color Emoji", run_out_of_distribution, 4)
TOKEN_EMBEDDINGS = Measurement("captions from token embeddings", "captions", run_token_embeddings, 1)
NEAREST_TOKENS = Measurement("nearest tokens", "nearest tokens", run_nearest_tokens, 1)
GENERATED_FROM = [
    reconstructions(ENCODER, "caption embeddings of the image"),
    replace(TRUE_CAPTIONS, label="its true caption"),
]

MEASUREMENTS = [
    *DATA_EFFICIENCY,
    *LOWER_LEARNING_RATES,
    *MORE_UPDATES,
    *PROJECTOR,
    *ALL_TRAINABLE,
    *ONE_LEARNING_RATE,
    *SMALL,
    *LARGE,
    *(reconstructions(encoder, encoder.folder) for encoder in ENCODERS),
    *(measurement for three in zip(TRUNCATION, COMPOSITION, SINGLE_OBJECTS, strict=True) for measurement in three),
    OUT_OF_DISTRIBUTION,
    TRUE_CAPTIONS,
    TOKEN_EMBEDDINGS,
    NEAREST_TOKENS,
]
