"""Quality of reconstructions by scheduler and number of steps: `python -m vlv.miniature.scheduler_steps MODEL`.

Each cell generates the images of the same scenes from the same noise. Object + place F1 is read by the scene
classifier, and FID compares its features of the reconstructions and of the images. Intervals are of the bootstrap over
scenes; the difference from the reference cell resamples both together. FID has one of the difference alone: repeated
images raise it. The images of each cell are kept, so that a run that was ended goes on.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vlv import hub
from vlv.evaluation import markdown_table
from vlv.evaluation.distances import bootstrap_interval, frechet_distance
from vlv.evaluation.statistics import FeatureStatistics
from vlv.files import write_atomically, write_json
from vlv.pipelines import ReconstructionPipeline, load_reconstruction
from vlv.pipelines.schedulers import build_scheduler

from .data import evaluation_items
from .evaluation import SCENE_CLASSIFIER_FILE, generate_in_batches
from .folding import fold_empty_positions
from .scene_classifier import SceneClassifier
from .scoring import ASPECTS
from .world import Scene

REFERENCE = "ddpm/50"  # the authors' sampling
F1_SAMPLES, FID_SAMPLES = 1000, 100  # resamplings of the bootstrap
HEADER = (
    "scheduler",
    "steps",
    "interval of guidance",
    "rows an image",
    "CPU s an image",
    "object + place F1",
    "difference",
    "FID",
    "difference",
)


@dataclass(frozen=True)
class Cell:
    """A scheduler, its number of steps, and the part of the schedule that guidance is limited to."""

    scheduler: str
    steps: int
    start: float = 0.0
    end: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Cell":
        """`SCHEDULER/STEPS` or `SCHEDULER/STEPS/START-END`.

        Raises:
            ValueError: If the text has another form.
        """
        scheduler, steps, *interval = text.split("/")
        start, end = interval[0].split("-") if interval else ("0", "1")
        return cls(scheduler, int(steps), float(start), float(end))

    def __str__(self) -> str:
        limits = "" if (self.start, self.end) == (0, 1) else f"/{self.start:g}-{self.end:g}"
        return f"{self.scheduler}/{self.steps}{limits}"


@dataclass
class Images:
    """What a cell generated.

    Attributes:
        pixels: `(N, 3, 64, 64)` uint8.
        rows: Rows that the denoiser computed for each image.
        seconds: CPU time for each image, of denoising and decoding.
    """

    pixels: torch.Tensor
    rows: float
    seconds: float


def generate(
    pipeline: ReconstructionPipeline, caption_embeds: torch.Tensor, cell: Cell, guidance_scale: float
) -> Images:
    """The images of one cell; image `i` has noise of the seed `i`.

    Args:
        caption_embeds: `(N, Q, d_text)`.
    """
    own = pipeline.scheduler
    pipeline.scheduler = build_scheduler(cell.scheduler, own)
    counted = Counter[str]()

    def count(denoiser: Any, arguments: tuple, keywords: dict[str, Any]) -> None:
        counted["rows"] += len(arguments[0] if arguments else keywords["hidden_states"])

    settings: dict[str, Any] = {}
    if (cell.start, cell.end) != (0, 1):
        settings["guidance_interval"] = (cell.start, cell.end)
    denoiser: Any = getattr(pipeline, "denoiser", None) or pipeline.unet
    hook = denoiser.register_forward_pre_hook(count, with_kwargs=True)
    try:
        started = time.process_time()
        arguments = (guidance_scale, cell.steps, 32)
        pixels = generate_in_batches(pipeline, "caption_embeds", caption_embeds, *arguments, **settings)
        seconds = time.process_time() - started
    finally:
        hook.remove()
        pipeline.scheduler = own
    count_images = len(caption_embeds)
    return Images(pixels, counted["rows"] / count_images, seconds / count_images)


def load_or_generate(path: Path, made_of: dict[str, str], make: Callable[[], Images]) -> Images:
    """The images of a cell from its file, or `make`'s, which are then written there.

    Args:
        made_of: What the images depend on beside the cell. A file of others is replaced.
    """
    if path.exists():
        with safe_open(path, "pt") as file:
            facts = file.metadata()
            if made_of.items() <= facts.items():
                return Images(file.get_tensor("pixels"), float(facts["rows"]), float(facts["seconds"]))
    images = make()
    facts = made_of | {"rows": str(images.rows), "seconds": str(images.seconds)}
    write_atomically(path, lambda temporary: save_file({"pixels": images.pixels}, temporary, facts))
    return images


class Scores:
    """Object + place F1 and FID of images, of all scenes or of resampled ones.

    Args:
        pixels: Generated images `(N, 3, 64, 64)` uint8.
        originals: Features of the rendered images, `(N, 256)`.
        scenes: What these show.
    """

    def __init__(
        self, pixels: torch.Tensor, originals: torch.Tensor, scenes: Sequence[Scene], classifier: SceneClassifier
    ):
        aspect = ASPECTS["object_place_f1"]
        pairs = [
            (Counter(map(aspect, found.objects)), Counter(map(aspect, scene.objects)))
            for found, scene in zip(classifier.predict_scenes(pixels), scenes, strict=True)
        ]
        self.matches = torch.tensor([(found & true).total() for found, true in pairs])  # (N,)
        self.totals = torch.tensor([found.total() + true.total() for found, true in pairs])  # (N,)
        with torch.no_grad():
            self.features = classifier.embed(pixels)  # (N, 256)
        self.originals = originals
        self.known: dict[tuple[int, ...], float] = {}  # FID of resampled scenes; cells have the same resamplings

    def f1(self, rows: torch.Tensor | slice) -> float:
        return 2 * self.matches[rows].sum().item() / self.totals[rows].sum().item()

    def fid(self, rows: torch.Tensor | slice) -> float:
        places = tuple(range(len(self.features))[rows] if isinstance(rows, slice) else rows.tolist())
        if places not in self.known:
            sets = (FeatureStatistics.of(part[list(places)]) for part in (self.features, self.originals))
            self.known[places] = frechet_distance(*sets)
        return self.known[places]


def score(own: Scores, reference: Scores) -> dict[str, Any]:
    """F1 and FID with their intervals, and the differences from the reference with theirs."""
    everything, count = slice(None), len(own.matches)
    found: dict[str, Any] = {}
    for name, samples in (("f1", F1_SAMPLES), ("fid", FID_SAMPLES)):
        value, other = (getattr(scores, name) for scores in (own, reference))

        def difference(rows: torch.Tensor | slice, value=value, other=other) -> float:
            return value(rows) - other(rows)

        found[name] = round(value(everything), 4)
        if name == "f1":
            found["f1_interval"] = _rounded(bootstrap_interval(count, value, samples))
        found[f"{name}_difference"] = round(difference(everything), 4)
        ends = [0.0, 0.0] if own is reference else bootstrap_interval(count, difference, samples)
        found[f"{name}_difference_interval"] = _rounded(ends)
    return found


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]


def results_table(results: dict[str, Any]) -> str:
    """The results as a Markdown table, in the order of the cells."""

    def cell(values: dict[str, Any], name: str, digits: int, sign: str = "") -> str:
        text = f"{values[name]:{sign}.{digits}f}"
        if (ends := values.get(f"{name}_interval")) is None:
            return text
        return f"{text} ({ends[0]:{sign}.{digits}f} to {ends[1]:{sign}.{digits}f})"

    rows = []
    for name, values in results.items():
        scheduler, steps, *interval = name.split("/")
        costs = (f"{values['rows']:g}", f"{values['seconds']:.2f}")
        digits = {"f1": 3, "f1_difference": 3, "fid": 1, "fid_difference": 1}
        scores = [cell(values, key, places, "+" if "difference" in key else "") for key, places in digits.items()]
        rows.append((scheduler, steps, interval[0] if interval else "all", *costs, *scores))
    return markdown_table(HEADER, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vlv.miniature.scheduler_steps", description=__doc__)
    parser.add_argument("model", help="folder of a miniature with its scene classifier")
    parser.add_argument(
        "--cells", nargs="*", default=[], metavar="SCHEDULER/STEPS[/START-END]", help="what is measured"
    )
    parser.add_argument(
        "--reference", default=REFERENCE, help="cell that others are compared with (default: %(default)s)"
    )
    parser.add_argument("--count", type=int, default=64, help="scenes of combo (default: %(default)s)")
    parser.add_argument("--guidance-scale", type=float, default=2.0, help="default: %(default)s")
    parser.add_argument("--work-dir", required=True, help="folder of the generated images")
    parser.add_argument("--output", metavar="FILE.json", help="also write the results there")
    options = parser.parse_args(arguments)
    folder, work = Path(options.model), Path(options.work_dir)
    work.mkdir(parents=True, exist_ok=True)
    classifier = SceneClassifier.load(folder / SCENE_CLASSIFIER_FILE)
    pipeline = load_reconstruction(folder)
    pipeline.set_progress_bar_config(disable=True)
    if getattr(pipeline, "transformer", None) is not None:
        fold_empty_positions(pipeline.transformer)
    pixels, scenes = evaluation_items("combo", options.count)
    caption_embeds = torch.cat([pipeline.get_caption_embeds(chunk) for chunk in pixels.split(32)])
    with torch.no_grad():
        originals = classifier.embed(pixels)
    reference, *cells = [Cell.parse(text) for text in [options.reference, *options.cells]]
    made_of = {"model": hub.fingerprint(folder), "guidance_scale": str(options.guidance_scale)}
    scores: dict[str, Scores] = {}
    results: dict[str, Any] = {}
    for cell in dict.fromkeys([reference, *cells]):
        make = partial(generate, pipeline, caption_embeds, cell, options.guidance_scale)
        images = load_or_generate(work / f"{str(cell).replace('/', '-')}-{options.count}.safetensors", made_of, make)
        scores[str(cell)] = Scores(images.pixels, originals, scenes, classifier)
        print(cell, f"{images.seconds:.2f} s an image, F1 {scores[str(cell)].f1(slice(None)):.3f}", flush=True)
        costs = {"rows": round(images.rows, 2), "seconds": round(images.seconds, 3)}
        results[str(cell)] = costs | score(scores[str(cell)], scores[str(reference)])
    print(results_table(results))
    if options.output:
        write_json(Path(options.output), {"scenes": options.count, "reference": str(reference), "cells": results})


if __name__ == "__main__":
    main()
