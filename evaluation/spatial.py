"""Spatial deviation: how far objects of reconstructions are from the same objects of their originals.

The paper's Table 6: Gemini 2.0 Flash detects boxes in three dimensions in both images, boxes with the same label are
matched, and the mean L1 deviation of angle, centre and scale is taken. Its images, their number, its prompt and the
units are not published.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import torch

from vlv.files import write_json

from .captioners import endpoint_settings
from .detections import BOXES, OBJECT, THRESHOLD, Detected, Detector, detect_all, deviations, match_detections
from .endpoint import EndpointOptions
from .generated_images import (
    PARTIAL_FILE,
    EmbeddingSource,
    GenerationConfig,
    generate_missing,
    relative_files,
    write_results,
)
from .guidance_scales import guidance_table
from .published import require_row
from .results import package_versions, per_image, ratio_figure, write_table

GUIDANCE = 2.0  # of the authors' code
LABELS = {
    "angle": "angle (L1)",
    "centre": "centre (L1)",
    "scale": "scale (L1)",
    "distance": "centre (Euclidean)",
    "matched": "share of objects matched",
}
DETECTIONS_LOG = "detections.jsonl"


@dataclass
class SpatialConfig(EndpointOptions, GenerationConfig):
    """Compares where objects are in reconstructions and in their originals (the paper's Table 6)."""

    REQUIRED: ClassVar[tuple[str, ...]] = ("images", "model", "detector", "output_dir")

    model: str = field(default="", metadata={"help": "folder or Hub repo id of a VLV; miniature is the embedded one"})
    guidance: list[float] = field(default_factory=lambda: [GUIDANCE], metadata={"help": "guidance scales"})
    num_inference_steps: int = field(default=50, metadata={"help": "denoising steps of each image"})
    detector: str = field(
        default="",
        metadata={
            "help": "what finds the objects: https://host/v1#model, a model behind an OpenAI-compatible endpoint; "
            "folder or Hub repo id of a model that transformers' pipeline object-detection loads; or "
            "scene-classifier, for the miniature's world"
        },
    )
    boxes: str = field(default="3d", metadata={"help": f"what an endpoint is asked for: {' or '.join(BOXES)}"})
    threshold: float = field(default=THRESHOLD, metadata={"help": "least score of an object, of object-detection"})
    paper: str | None = field(
        default=None, metadata={"help": "row of the paper's Table 6 beside the figures, such as table6/40m"}
    )
    max_tokens: int = field(default=2048, metadata={"help": "most tokens of an answer, of an endpoint"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.boxes not in BOXES:
            raise ValueError(f"boxes is one of {', '.join(BOXES)}, not {self.boxes!r}")
        require_row(self.paper, "spatial")
        if self.paper and ("://" not in self.detector or self.boxes != "3d"):
            raise ValueError(
                "paper's figures are of boxes in three dimensions by an endpoint; set boxes to 3d, or no paper"
            )
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold must be at least 0 and below 1, not {self.threshold}")
        if "://" in self.detector:
            endpoint_settings(self.detector, max_tokens=self.max_tokens, **self.options())  # checks them


def plan_spatial(config: SpatialConfig, images: Mapping[str, Path]) -> str:
    """What a run would do."""
    count = len(images) * (1 + len(config.guidance))
    return f"{config.describe(len(images), config.model)}\nobjects of {count} images by {config.detector}"


def run_spatial(
    config: SpatialConfig,
    images: Mapping[str, Path],
    load_pipeline: Callable[[], Any],
    fingerprint: str,
    detector: Detector,
    advance: Callable[[int], Any] = lambda images: None,
) -> dict[str, Any]:
    """Runs the protocol and writes `results.json` and `results.md` into `output_dir`.

    Args:
        images: Files by name.
        load_pipeline: Returns the reconstruction pipeline. Called only if an image is missing.
        fingerprint: Of the model.
        advance: Called with the number of images that are generated or read, after each batch.

    Returns:
        What `results.json` holds: `metrics`, `failed`, `per_image` and `files` (as `compare_over_guidance`) by
        guidance, `notes`, `config` and `versions`.

    Raises:
        EndpointError, PriceReached: As `endpoint.Endpoint.ask`.
        ValueError: If an image cannot be read.
    """
    folder = Path(config.output_dir)
    source = EmbeddingSource(images, load_pipeline, fingerprint)
    paths = list(images.values())
    results: dict[str, Any] = {
        "metrics": {},
        "failed": {},
        "per_image": {},
        "files": {},
        "notes": [],
        "detector": detector.name,
        "num_images": len(paths),
        "config": asdict(config),
        "model_fingerprint": fingerprint,
        "versions": package_versions(),
    }
    names = list(images)
    originals = detect_all(detector, paths, names, config.batch_size, advance)
    for guidance in config.guidance:
        files = generate_missing(source, guidance, config, advance)
        titles = [f"{name}, guidance {guidance:g}" for name in names]
        generated = detect_all(detector, files, titles, config.batch_size, advance)
        figures, notes, failed = spatial_figures(names, originals, generated, config.bootstrap)
        results["metrics"][f"{guidance:g}"] = figures
        results["failed"][f"{guidance:g}"] = failed
        results["per_image"][f"{guidance:g}"] = image_deviations(names, originals, generated)
        results["files"][f"{guidance:g}"] = relative_files(names, files, folder)
        results["notes"] = list(dict.fromkeys([*results["notes"], *notes]))
        write_json(folder / PARTIAL_FILE, results)
    write_results(folder, results)
    write_table(folder, guidance_table(results))
    return results


def spatial_figures(
    names: Sequence[str], originals: Sequence[Detected], generated: Sequence[Detected], samples: int
) -> tuple[dict[str, Any], list[str], dict[str, str]]:
    """Mean deviations of matched objects, and the share of objects that are matched.

    Args:
        names: Of the images.
        originals: What was found in each original.
        generated: Like `originals`, of the reconstructions.
        samples: Resamplings of the images for the intervals; 0 for none.

    Returns:
        Figures, notes, and the images that are left out because a detection failed, with the reasons.

    Raises:
        ValueError: If it failed for all.
    """
    failed: dict[str, str] = {}
    sums: list[dict[str, float]] = []
    counts: list[tuple[int, int]] = []  # matched objects, and objects of the original
    for name, original, image in zip(names, originals, generated, strict=True):
        if original.detections is None or image.detections is None:
            failed[name] = original.error or image.error or "no answer"
            continue
        pairs = match_detections(original.detections, image.detections)
        each = [deviations(*pair) for pair in pairs]
        sums.append({key: sum(own.get(key, 0.0) for own in each) for key in LABELS})
        sums[-1]["angles"] = sum("angle" in own for own in each)
        counts.append((len(pairs), sum(own.kind == OBJECT for own in original.detections)))
    if len(failed) == len(names):
        raise ValueError(f"the detector answered for no image; the first reason: {next(iter(failed.values()))}")
    notes = [f"{len(failed)} of {len(names)} images are left out: a detection failed"] if failed else []
    figures: dict[str, Any] = {}
    number = torch.tensor(counts, dtype=torch.float64).reshape(-1, 2)
    matched = sum(count for count, _ in counts)
    for key in ("angle", "centre", "scale", "distance"):
        total = torch.tensor([own[key] for own in sums], dtype=torch.float64)
        count = torch.tensor([own["angles"] for own in sums]) if key == "angle" else number[:, 0]
        if count.any():
            figures[key] = ratio_figure(LABELS[key], total, count, samples, num_objects=int(count.sum()))
    if number[:, 1].any():
        figures["matched"] = ratio_figure(LABELS["matched"], number[:, 0], number[:, 1], samples)
    if not matched:
        notes.append("no object of an original was found in its reconstruction, so there are no deviations")
    return figures, notes, failed


def image_deviations(
    names: Sequence[str], originals: Sequence[Detected], generated: Sequence[Detected]
) -> dict[str, dict[str, float]]:
    """Of each figure, its value for each image: the mean over its matched objects, and the share of them.

    Args:
        names, originals, generated: As in `spatial_figures`.
    """
    found: dict[str, list[float]] = {key: [] for key in ("centre", "scale", "distance", "angle", "matched")}
    for original, image in zip(originals, generated, strict=True):
        first, second = original.detections or [], image.detections or []
        each = [deviations(*pair) for pair in match_detections(first, second)]
        for key in ("centre", "scale", "distance", "angle"):
            values = [own[key] for own in each if key in own]
            found[key].append(fmean(values) if values else math.nan)
        count = sum(own.kind == OBJECT for own in first)
        known = count and image.detections is not None
        found["matched"].append(len(each) / count if known else math.nan)
    return {key: own for key, own in per_image(found, names).items() if own}
