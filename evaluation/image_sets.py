"""Compares a set of generated images with a set of reference images: by their features, and pair by pair."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from .distances import SUBSET_SIZE, distance_interval, frechet_distance, gaussian_mmd, kernel_distance, rank_note
from .features import FeatureExtractor, fingerprint_images, load_rgb, require
from .image_similarity import image_metrics, perceptual_distance
from .matching import match_names
from .results import figure, mean_figure
from .statistics import FeatureStatistics, gather_statistics, process_shard

PAIR_METRICS = {
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "cosine": "cosine of features",
    "lpips": "LPIPS (AlexNet)",
    "dreamsim": "DreamSim",
    "scenes": "scenes of the miniature",
}
FEATURE_METRICS = ("cosine", "scenes")
"""Pair metrics that the feature extractor computes."""
DISTANCE_SAMPLES = 100
"""Resamplings for the interval of a distance of sets, which costs as many computations of the distance."""


def extract_statistics(
    paths: Sequence[Path],
    extractor: FeatureExtractor,
    batch_size: int = 32,
    keep_features: bool = True,
    advance: Callable[[int], Any] = lambda images: None,
) -> FeatureStatistics:
    """The statistics of the features of image files.

    With `torch.distributed`, each process reads its share of the files, and all get the statistics of all.

    Args:
        keep_features: See `FeatureStatistics`. The kernel distances and the intervals need them.
        advance: Called with the number of images after each batch.

    Raises:
        ValueError: If an image cannot be read; the message names it.
    """
    statistics = FeatureStatistics(keep_features=keep_features)
    mine = process_shard(paths)
    for start in range(0, len(mine), batch_size):
        batch = [load_rgb(path) for path in mine[start : start + batch_size]]
        statistics.update(extractor(batch))
        advance(len(batch))
    return gather_statistics(statistics)


def cached_statistics(
    paths: Sequence[Path], extractor: FeatureExtractor, file: Path | None, **settings: Any
) -> FeatureStatistics:
    """As `extract_statistics`, read from `file` where it exists, else written there.

    Args:
        paths: Without any, `file` must exist.

    Raises:
        ValueError: If `file` is of other images or another extractor.
    """
    if file is None:
        return extract_statistics(paths, extractor, **settings)
    if file.suffix == ".npz" and getattr(extractor, "resize", None) != "pytorch-fid":
        raise ValueError(
            f"{file}: the statistics of pytorch-fid are of Inception's features of images resized as pytorch-fid, not "
            f"of {extractor.name}; pass --features inception --resize pytorch-fid, or a .safetensors file"
        )
    fingerprint = fingerprint_images(paths) if paths else None
    if file.exists() or fingerprint is None:
        return FeatureStatistics.load(file, extractor=extractor.fingerprint, fingerprint=fingerprint)
    statistics = extract_statistics(paths, extractor, **settings)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        statistics.save(file, fingerprint, extractor.fingerprint)
    return statistics


def compare_sets(
    generated: FeatureStatistics,
    reference: FeatureStatistics,
    extractor: FeatureExtractor,
    samples: int = DISTANCE_SAMPLES,
    paired: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """Figures of the distance between two sets, and notes on how far they can be trusted.

    Args:
        samples: Resamplings for the intervals; 0 for none.
        paired: Whether image `i` of both sets belongs to one input, see `distance_interval`.

    Returns:
        `frechet_distance`, `kernel_distance` and `gaussian_mmd`; the first alone if a set has no features.

    Raises:
        ValueError: If the features differ in width, or a set has fewer than 2 images.
    """
    labels = _labels(extractor)
    notes = [
        note for one, name in ((generated, "generated"), (reference, "reference")) if (note := rank_note(one, name))
    ]
    frechet = frechet_distance(generated, reference)
    if not (generated.chunks and reference.chunks):
        notes.append("a statistics file without features gives the Fréchet distance alone, without an interval")
        return {"frechet_distance": figure(labels[0], frechet)}, notes
    pair = generated.features, reference.features
    found = {}
    for name, label, distance, value, limit, minimum in (
        ("frechet_distance", labels[0], _frechet_of_features, frechet, None, 0.0),
        ("kernel_distance", labels[1], kernel_distance, kernel_distance(*pair), SUBSET_SIZE, -math.inf),
        ("gaussian_mmd", labels[2], gaussian_mmd, gaussian_mmd(*pair), SUBSET_SIZE, 0.0),
    ):
        interval = distance_interval(distance, *pair, value, samples, limit, minimum, paired) if samples > 1 else None
        found[name] = figure(label, value, interval)
    return found, notes


def _labels(extractor: FeatureExtractor) -> tuple[str, str, str]:
    """What the three distances are called with these features."""
    if extractor.name.startswith("Inception"):
        return "FID", "KID", "MMD (Gaussian)"
    mmd = "CMMD" if getattr(extractor, "is_contrastive", False) else "MMD (Gaussian)"
    return "Fréchet distance", "kernel distance", mmd


def _frechet_of_features(first: torch.Tensor, second: torch.Tensor) -> float:
    return frechet_distance(FeatureStatistics.of(first, False), FeatureStatistics.of(second, False))


def match_pairs(generated: Mapping[str, Path], reference: Mapping[str, Path]) -> list[tuple[str, str]]:
    """The names of images that belong together, as `match_names` finds them.

    Args:
        generated: Files by name.
        reference: Like `generated`.

    Raises:
        ValueError: If an image could have two references, or a reference belongs to two images.
    """
    return list(match_names(generated, reference, "the reference images").items())


def require_pair_metrics(metrics: Iterable[str], extractors: Iterable[FeatureExtractor]) -> None:
    """Checks that pair metrics can be computed, before images are generated or read.

    Raises:
        ImportError: If the package of a metric is not installed.
        ValueError: For `scenes` without an extractor that reads them.
    """
    for name in metrics:
        if name == "scenes" and not any(hasattr(own, "compare_scenes") for own in extractors):
            raise ValueError("the pair metric scenes needs the features scene-classifier, which read them")
        if name in ("psnr", "ssim"):
            require("torchmetrics")
        elif name in ("lpips", "dreamsim"):
            require(name, f"pip install {name}")


def compare_pairs(
    pairs: Iterable[tuple[Path, Path]],
    metrics: Sequence[str],
    device: str = "cpu",
    advance: Callable[[int], Any] = lambda images: None,
) -> dict[str, list[float]]:
    """One value for each pair of a generated image and its original, by metric: `psnr`, `ssim`, `lpips`, `dreamsim`.

    A generated image of another size is resized to its original's, bilinearly with antialiasing.

    Raises:
        ImportError: If the package of a metric is not installed.
        ValueError: If an image cannot be read, or is too small for a metric.
    """
    perceptual = {name: perceptual_distance(name, device) for name in metrics if name in ("lpips", "dreamsim")}
    values: dict[str, list[float]] = {name: [] for name in metrics}
    for generated, original in pairs:
        picture, target = load_rgb(generated).float() / 255, load_rgb(original).float() / 255
        if picture.shape != target.shape:
            size = (target.shape[1], target.shape[2])
            picture = F.interpolate(picture[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)
        found = {}
        if simple := {"psnr", "ssim"} & set(metrics):
            try:
                found = image_metrics(picture, target, list(simple))
            except ValueError as error:
                raise ValueError(f"{original}: {error}") from error
        found |= {name: distance(picture, target) for name, distance in perceptual.items()}
        for name in metrics:
            values[name].append(found[name])
        advance(1)
    return values


def scene_figures(
    extractor: FeatureExtractor, generated: Sequence[Path], originals: Sequence[Path], samples: int
) -> tuple[dict[str, Any], dict[str, Sequence[float]]]:
    """The figures of the pair metric `scenes`, and the values of each pair; none of an extractor that reads no scenes.

    Args:
        generated: One file for each of `originals`.
        samples: Resamplings for the intervals; 0 for none.
    """
    if not hasattr(extractor, "compare_scenes"):
        return {}, {}
    measured = extractor.compare_scenes(generated, originals)
    return measured.figures(len(generated), samples), measured.values


def cosine_similarities(first: torch.Tensor, second: torch.Tensor) -> list[float]:
    """The cosine of each feature `(N, width)` of one set with the same row of another."""
    return torch.cosine_similarity(first.double(), second.double()).tolist()


def pair_figures(values: Mapping[str, Sequence[float]], samples: int) -> tuple[dict[str, Any], list[str]]:
    """The means of `compare_pairs` as figures, and notes. The infinite PSNR of equal images is left out."""
    figures, notes = {}, []
    for name, each in values.items():
        finite = [value for value in each if value != float("inf")]
        if len(finite) < len(each):
            notes.append(f"{len(each) - len(finite)} images equal their originals; they have no PSNR")
        if finite:
            figures[name] = mean_figure(PAIR_METRICS[name], finite, samples, num_images=len(finite))
    return figures, notes
