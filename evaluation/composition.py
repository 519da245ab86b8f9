"""Composition: images are generated from the leading caption embeddings of two images, one after the other.

The paper's Figure 6 shows examples, without figures. Here each generated image is compared with both images: by
features, by the objects that a detector finds, or by a vision model that scores how much of an image it shows.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image

from vlv.files import write_json
from vlv.pipelines import generate_images
from vlv.processing_vlv import to_rgb

from .captioners import endpoint_settings
from .detections import BACKGROUND, OBJECT, Detected, Detector, detect_all
from .endpoint import Endpoint, EndpointOptions, Question, image_part
from .features import FeatureExtractor, file_digest
from .generated_images import (
    PARTIAL_FILE,
    GenerationConfig,
    generate_missing,
    relative_files,
    to_pil_images,
    write_results,
)
from .image_sets import cosine_similarities, extract_statistics
from .judge import parse_score
from .markdown import markdown_table
from .matching import match_names
from .results import (
    format_figure,
    mean_figure,
    package_versions,
    per_image,
    ratio_figure,
    write_table,
)

ORDER = ("first", "second")
ANSWERS_LOG = "answers.jsonl"
CONTENT_PROMPT = """\
How much of what the first image shows does the second image show, too? Look at its subject, the look and style of \
the subject, and its surroundings. Other content of the second image does not count against it.

6: all of it, and recognisably the same.
4: the subject, with small differences.
2: a part of it, or something similar.
0: nothing of it.

Explain in one or two sentences, then end with a line of the form
Score: N"""


@dataclass
class CompositionConfig(EndpointOptions, GenerationConfig):
    """Generates images from the leading caption embeddings of two images (the paper's Figure 6)."""

    REQUIRED: ClassVar[tuple[str, ...]] = ("images", "model", "counts", "output_dir")

    model: str = field(default="", metadata={"help": "folder or Hub repo id of a VLV; miniature is the embedded one"})
    guidance: list[float] = field(default_factory=lambda: [2.0], metadata={"help": "guidance scales"})
    num_inference_steps: int = field(default=50, metadata={"help": "denoising steps of each image"})
    counts: list[str] = field(
        default_factory=list,
        metadata={"help": "embeddings of the first and the second image, such as 39+38; several are several rows"},
    )
    pairs: str | None = field(
        default=None,
        metadata={
            "help": "JSON: [[image, image], ...] (default: the images of the first half with those of the second)"
        },
    )
    features: str | None = field(
        default=None, metadata={"help": "compares by features, as --features of `vlv evaluate images`"}
    )
    resize: str = field(default="pytorch-fid", metadata={"help": "as --resize of `vlv evaluate images`"})
    detector: str | None = field(
        default=None,
        metadata={
            "help": "compares by objects: folder or Hub repo id of a model that transformers' pipeline "
            "object-detection loads, or scene-classifier, for the miniature's world"
        },
    )
    judge: str | None = field(
        default=None,
        metadata={"help": "compares by scores: https://host/v1#model, a model behind an OpenAI-compatible endpoint"},
    )
    max_tokens: int = field(default=512, metadata={"help": "most tokens of an answer of judge"})

    def __post_init__(self) -> None:
        if isinstance(self.counts, str):
            self.counts = [self.counts]
        super().__post_init__()
        for text in self.counts:
            parse_counts(text)
        if not (self.features or self.detector or self.judge):
            raise ValueError("set features, detector or judge: what the generated images are compared by")
        if self.detector and "://" in self.detector:
            raise ValueError("detector is an endpoint; set judge to it, which scores the images")
        if self.judge:
            endpoint_settings(self.judge, max_tokens=self.max_tokens, **self.options())  # checks them


def parse_counts(text: str) -> tuple[int, int]:
    """`39+38` as two numbers. Raises `ValueError` for another form."""
    found = re.fullmatch(r"(\d+)\+(\d+)", str(text))
    if found is None or not (int(found[1]) or int(found[2])):
        raise ValueError(f"counts are numbers of embeddings of two images, such as 39+38, not {text!r}")
    return int(found[1]), int(found[2])


def read_pairs(config: CompositionConfig, images: Mapping[str, Path]) -> list[tuple[str, str]]:
    """The names of the images of each pair.

    Args:
        images: Files by name.

    Raises:
        ValueError: If the file is another one, names an image that is not there or a pair twice, or there are fewer
            than two images.
    """
    if config.pairs is None:
        names = list(images)[: config.limit]
        half = len(names) // 2
        if not half:
            raise ValueError(f"images {config.images} has {len(names)} images; a composition needs at least 2")
        return list(zip(names[:half], names[half : 2 * half], strict=True))
    try:
        pairs = json.loads(Path(config.pairs).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"pairs {config.pairs} cannot be read as JSON: {error}") from error
    fits = isinstance(pairs, list) and all(isinstance(own, list) and len(own) == 2 for own in pairs) and pairs
    if not fits or not all(isinstance(name, str) for own in pairs for name in own):
        raise ValueError(f"pairs {config.pairs} must hold [[image, image], ...]")
    names = list(dict.fromkeys(name for own in pairs for name in own))
    found = match_names(names, images, f"images {config.images}")
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"images {config.images} has no {missing[0]!r}, which pairs {config.pairs} names")
    read = [(found[one], found[other]) for one, other in pairs]
    for pair, times in Counter(read).items():
        if times > 1:
            raise ValueError(f"pairs {config.pairs} has {list(pair)} {times} times; a pair may stand once")
    return read[: config.limit]


def pair_names(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """A name for each pair. Raises `ValueError` if two have the same name."""
    names = [" + ".join(pair) for pair in pairs]
    if repeated := [name for name, times in Counter(names).items() if times > 1]:
        raise ValueError(f"two pairs of images have the name {repeated[0]!r}; rename an image, or remove a pair")
    return names


class MixedSource:
    """The leading caption embeddings of two images, and the reconstruction pipeline of a VLV.

    Args:
        images: Files by name.
        pairs: Names of the two images of each generated image, each pair once.
        counts: How many embeddings are taken of each of the two.
        load_pipeline: Returns the pipeline. Called only if an image is missing.
    """

    def __init__(
        self,
        images: Mapping[str, Path],
        pairs: Sequence[tuple[str, str]],
        counts: tuple[int, int],
        load_pipeline: Callable[[], Any],
        fingerprint: str,
    ):
        self.images, self.counts, self.load_pipeline, self.fingerprint = images, counts, load_pipeline, fingerprint
        self.names = pair_names(pairs)
        self.pairs = dict(zip(self.names, pairs, strict=True))

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {name: file_digest(self.images[name]) for pair in self.pairs.values() for name in pair}

    def identity(self, name: str) -> str:
        first, second = (self._digests[own] for own in self.pairs[name])
        return f"{self.counts[0]} of {first}, {self.counts[1]} of {second}"

    @torch.no_grad()
    def generate(self, names: Sequence[str], seeds: Sequence[int], **settings: Any) -> list[Image.Image]:
        """As `ImageSource.generate`. Raises `ValueError` if the model has fewer embeddings or positions."""
        pipeline = self.load_pipeline()
        pictures = [to_rgb(str(self.images[own])) for name in names for own in self.pairs[name]]
        embeds = pipeline.get_caption_embeds(pictures)  # (2 B, Q, d_text)
        mixed = [pipeline.mix_caption_embeds(list(own), self.counts) for own in embeds.split(2)]
        return to_pil_images(generate_images(pipeline, caption_embeds=torch.cat(mixed), seeds=seeds, **settings))

    def file_info(self, name: str) -> None:
        return None


@dataclass(frozen=True)
class Instruments:
    """What the generated images are compared by: one or more of three."""

    extractor: FeatureExtractor | None = None
    detector: Detector | None = None
    judge: Endpoint | None = None


def open_judge(config: CompositionConfig) -> Endpoint | None:
    """The endpoint of `judge`, with its answers in `output_dir`.

    Raises:
        ImportError, EndpointError: As `endpoint.Endpoint`.
    """
    if config.judge is None:
        return None
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    settings = endpoint_settings(config.judge, max_tokens=config.max_tokens, **config.options())
    return Endpoint(settings, folder / ANSWERS_LOG)


def plan_composition(config: CompositionConfig, pairs: Sequence[tuple[str, str]]) -> str:
    """What a run would do."""
    count = len(pairs) * len(config.counts)
    by = {name: getattr(config, name) for name in ("features", "detector", "judge")}
    instruments = ", ".join(f"{name} {value}" for name, value in by.items() if value)
    requests = f", {2 * count * len(config.guidance)} requests" if config.judge else ""
    rows = f"{len(pairs)} pairs, such as {' + '.join(pairs[0])}, with {', '.join(config.counts)} embeddings"
    return f"{config.describe(count, config.model)}\n{rows}\ncompared by {instruments}{requests}"


def run_composition(
    config: CompositionConfig,
    images: Mapping[str, Path],
    pairs: Sequence[tuple[str, str]],
    load_pipeline: Callable[[], Any],
    fingerprint: str,
    instruments: Instruments,
    advance: Callable[[int], Any] = lambda images: None,
) -> dict[str, Any]:
    """Runs the protocol and writes `results.json` and `results.md` into `output_dir`.

    Args:
        images: Files by name.
        pairs: Names of two images each.
        load_pipeline: Returns the reconstruction pipeline. Called only if an image is missing.
        fingerprint: Of the model.
        advance: Called with the number of generated images after each batch.

    Returns:
        What `results.json` holds: `metrics`, `failed`, `per_image` and `files` (the generated images, relative to
        `output_dir`) by counts and guidance, `originals` (the first and the second image of each pair), `config` and
        `versions`.

    Raises:
        EndpointError, PriceReached: As `endpoint.Endpoint.ask`.
        ValueError: If an image cannot be read, `counts` do not fit the model, or nothing was compared.
    """
    folder = Path(config.output_dir)
    used = list(dict.fromkeys(name for pair in pairs for name in pair))
    places = {name: place for place, name in enumerate(used)}
    rows = [[places[pair[side]] for pair in pairs] for side in (0, 1)]
    measures = _Measures(config, {name: images[name] for name in used}, rows, instruments)
    names = pair_names(pairs)
    named = dict(zip(names, pairs, strict=True))
    results: dict[str, Any] = {
        "metrics": {},
        "failed": {},
        "per_image": {},
        "files": {},
        "originals": {side: {name: pair[i] for name, pair in named.items()} for i, side in enumerate(ORDER)},
        "notes": [],
        "num_pairs": len(pairs),
        "config": asdict(config),
        "model_fingerprint": fingerprint,
        "versions": package_versions(),
    }
    for counts in config.counts:
        source = MixedSource(images, pairs, parse_counts(counts), load_pipeline, fingerprint)
        for guidance in config.guidance:
            key = counts if len(config.guidance) == 1 else f"{counts}, guidance {guidance:g}"
            files = generate_missing(source, guidance, config, advance)
            figures, each, failed = measures.of(names, files)
            results["metrics"][key] = figures
            results["per_image"][key] = per_image(each, names)
            results["files"][key] = relative_files(names, files, folder)
            if not figures:
                raise ValueError(f"the judge gave no score; the first reason: {next(iter(failed.values()))}")
            if failed:
                results["failed"][key] = failed
                results["notes"].append(f"{key}: {len(failed)} scores of {2 * len(pairs)} are missing")
            write_json(folder / PARTIAL_FILE, results)
    write_results(folder, results)
    write_table(folder, composition_table(results))
    return results


class _Measures:
    """Compares generated images with both images of their pairs.

    Args:
        originals: Files of all images by name.
        rows: For the first and for the second image of each pair, its place among the originals.
    """

    def __init__(
        self, config: CompositionConfig, originals: Mapping[str, Path], rows: list[list[int]], instruments: Instruments
    ):
        self.config, self.rows, self.instruments = config, rows, instruments
        self.originals = list(originals.values())
        if instruments.extractor is not None:
            self.features = extract_statistics(self.originals, instruments.extractor, config.batch_size).features
        if instruments.detector is not None:
            self.detections = detect_all(instruments.detector, self.originals, list(originals), config.batch_size)

    def of(
        self, names: Sequence[str], files: Sequence[Path]
    ) -> tuple[dict[str, Any], dict[str, list[float]], dict[str, str]]:
        """Figures of generated images, one for each pair; the values of each image, NaN where there is none; and the
        scores that are missing, with the reasons.
        """
        figures: dict[str, Any] = {}
        each: dict[str, list[float]] = {}
        failed: dict[str, str] = {}
        if self.instruments.extractor is not None:
            found, values = self._similarities(files)
            figures, each = figures | found, each | values
        if self.instruments.detector is not None:
            detected = detect_all(self.instruments.detector, files, names, self.config.batch_size)
            truth = [[self.detections[row] for row in rows] for rows in self.rows]
            figures |= recall_figures(detected, truth, self.config.bootstrap)
        if self.instruments.judge is not None:
            found, values, failed = self._scores(self.instruments.judge, names, files)
            figures, each = figures | found, each | values
        return figures, each, failed

    def _similarities(self, files: Sequence[Path]) -> tuple[dict[str, Any], dict[str, list[float]]]:
        assert self.instruments.extractor is not None
        generated = extract_statistics(files, self.instruments.extractor, self.config.batch_size).features
        figures, each = {}, {}
        for side, rows in zip(ORDER, self.rows, strict=True):
            values = cosine_similarities(generated, self.features[rows])
            figures[f"cosine_{side}"] = mean_figure(f"cosine with the {side}", values, self.config.bootstrap)
            each[f"cosine_{side}"] = values
        others = other_firsts(list(zip(*self.rows, strict=True)))
        if others is not None:  # the level of chance
            values = cosine_similarities(generated, self.features[others])
            figures["cosine_other"] = mean_figure("cosine with another pair's", values, self.config.bootstrap)
        return figures, each

    def _scores(
        self, judge: Endpoint, names: Sequence[str], files: Sequence[Path]
    ) -> tuple[dict[str, Any], dict[str, list[float]], dict[str, str]]:
        asked = [(side, place) for side in (0, 1) for place in range(len(files))]
        questions = (
            Question(
                f"{ORDER[side]}/{files[place].parent.name}/{files[place].name}",
                _show_both(self.originals[self.rows[side][place]], files[place]),
            )
            for side, place in asked
        )
        each = {f"score_{side}": [math.nan] * len(files) for side in ORDER}
        failed = {}
        for (side, place), answer in zip(asked, judge.ask(questions), strict=True):
            score = None if answer.text is None else parse_score(answer.text)
            if score is None:
                failed[f"{names[place]}, {ORDER[side]}"] = answer.error or f"no score: {str(answer.text)[-80:]!r}"
            else:
                each[f"score_{ORDER[side]}"][place] = score
        figures = {}
        for which in ORDER:
            key, label = f"score_{which}", f"score of the {which}, 0 to 6"
            if known := [score for score in each[key] if not math.isnan(score)]:
                figures[key] = mean_figure(label, known, self.config.bootstrap, num_images=len(known))
        return figures, each, failed


def other_firsts(pairs: Sequence[tuple[int, int]]) -> list[int] | None:
    """For each pair of images, the first image of the next pair that has neither of its two; None if a pair has none.

    Pairs after the last one are those from the beginning.
    """
    found = []
    for place, pair in enumerate(pairs):
        following = [*pairs[place + 1 :], *pairs[:place]]
        other = next((own for own in following if not set(own) & set(pair)), None)
        if other is None:
            return None
        found.append(other[0])
    return found


def _show_both(original: Path, generated: Path) -> list[dict[str, Any]]:
    images = [image_part(path.read_bytes()) for path in (original, generated)]
    return [{"role": "user", "content": [*images, {"type": "text", "text": CONTENT_PROMPT}]}]


def recall_figures(found: Sequence[Detected], truth: Sequence[Sequence[Detected]], samples: int) -> dict[str, Any]:
    """The shares of labels of the first and of the second images that are found in generated images, at any place.

    Args:
        found: In each generated image.
        truth: In the first image of each, and in the second.
    """
    figures = {}
    for kind in (OBJECT, BACKGROUND):
        for side, own in zip(ORDER, truth, strict=True):
            shared, total = count_shared_labels([_labels(one, kind) for one in found], [_labels(t, kind) for t in own])
            if not total.any():
                continue
            label = f"{kind}s of the {side} found" if kind == OBJECT else f"{kind} of the {side} found"
            figures[f"{kind}_{side}"] = ratio_figure(label, shared, total, samples)
    return figures


def count_shared_labels(
    found: Sequence[Counter[str]], truth: Sequence[Counter[str]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each image, how many true labels are found, each as often as it occurs, and how many there are: `(N,)`."""
    shared = torch.tensor([(f & t).total() for f, t in zip(found, truth, strict=True)], dtype=torch.float64)
    return shared, torch.tensor([t.total() for t in truth], dtype=torch.float64)


def _labels(found: Detected, kind: str) -> Counter[str]:
    return Counter(own.label for own in found.detections or [] if own.kind == kind)


def composition_table(results: Mapping[str, Any]) -> str:
    """The figures by counts as a Markdown table."""
    labels = {key: one["label"] for figures in results["metrics"].values() for key, one in figures.items()}
    rows = [
        (counts, *(format_figure(figures.get(key)) for key in labels))
        for counts, figures in results["metrics"].items()
    ]
    return markdown_table(("embeddings", *labels.values()), rows)
