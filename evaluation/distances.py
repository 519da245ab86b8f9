"""Distances between two sets of features (Fréchet, kernel MMD), and intervals by the bootstrap."""

import math
from collections.abc import Callable, Sequence

import torch

from .statistics import FeatureStatistics

SUBSETS, SUBSET_SIZE = 100, 1000
"""Of the kernel distance, as published with KID."""
GAUSSIAN_BANDWIDTH, GAUSSIAN_SCALE = 10.0, 1000.0
"""Of CMMD's kernel, as published."""
BLOCK = 2048  # rows of a kernel matrix that are computed at once


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """The squared Fréchet (2-Wasserstein) distance of two Gaussians with the mean and covariance of two sets.

    `|m1 - m2|² + tr(C1) + tr(C2) - 2 tr((C1^½ C2 C1^½)^½)`, with symmetric eigenvalues in float64. The general square
    root `sqrtm(C1 C2)` of other tools has the same trace, and fails on covariances that do not have full rank.

    Raises:
        ValueError: If the widths differ, or a set has fewer than 2 images.
    """
    _same_width(first.mean, second.mean)
    c1, c2 = first.covariance, second.covariance
    values, vectors = torch.linalg.eigh(c1)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T  # C1^½
    inner = root @ c2 @ root
    cross = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp_min(0).sqrt().sum()
    distance = (first.mean - second.mean).square().sum() + c1.trace() + c2.trace() - 2 * cross
    return max(distance.item(), 0.0)


def rank_note(statistics: FeatureStatistics, name: str) -> str | None:
    """What makes a Fréchet distance untrustworthy: fewer images than dimensions. None if there are enough."""
    if statistics.count is None or statistics.count > statistics.width:
        return None
    return (
        f"the {name} set has {statistics.count} images for features of width {statistics.width}: its covariance does "
        f"not have full rank, and the Fréchet distance is too large; use more than {statistics.width} images"
    )


def kernel_distance(
    first: torch.Tensor, second: torch.Tensor, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE, seed: int = 0
) -> float:
    """The unbiased squared MMD with the kernel `(x·y / width + 1)³`: KID, on Inception features.

    The mean over random subsets of both sets, as published, each at most as large as the smaller set. Sets with the
    same number of images, at most `subset_size`, are compared at once.

    Args:
        first: Features `(N, width)`.
        second: Features `(M, width)`.

    Raises:
        ValueError: If the widths differ, or a set has fewer than 2 images.
    """
    _same_width(first, second)
    first, second = first.double(), second.double()
    size = min(len(first), len(second), subset_size)
    if size < 2:
        raise ValueError(f"a kernel distance needs at least 2 images in each set, got {len(first)} and {len(second)}")
    if len(first) == len(second) == size:
        return _unbiased_mmd(first, second)
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(subsets):
        rows = [torch.randperm(len(features), generator=generator)[:size] for features in (first, second)]
        total += _unbiased_mmd(first[rows[0]], second[rows[1]])
    return total / subsets


def _unbiased_mmd(x: torch.Tensor, y: torch.Tensor) -> float:
    n = len(x)

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    within = sum((k := kernel(a, a)).sum() - k.trace() for a in (x, y)) / (n * (n - 1))
    return float(within - 2 * kernel(x, y).mean())


def gaussian_mmd(first: torch.Tensor, second: torch.Tensor) -> float:
    """The squared MMD with a Gaussian kernel of unit-length features, times 1000: CMMD, on CLIP's image embeddings.

    The estimator with the diagonals, bandwidth 10, as published. 0 for two sets with the same images.

    Args:
        first: Features `(N, width)`. They are normalised here.
        second: Features `(M, width)`.
    """
    _same_width(first, second)
    x, y = (torch.nn.functional.normalize(features.double(), dim=-1) for features in (first, second))

    def mean_kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for rows in a.split(BLOCK):
            squared = (2 - 2 * rows @ b.T).clamp_min(0)  # (BLOCK, M): squared distances on the unit sphere
            total += torch.exp(-squared / (2 * GAUSSIAN_BANDWIDTH**2)).sum()
        return total / (len(a) * len(b))

    return GAUSSIAN_SCALE * float(mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))


def _same_width(first: torch.Tensor, second: torch.Tensor) -> None:
    if first.shape[-1] != second.shape[-1]:
        raise ValueError(
            f"features of width {first.shape[-1]} and {second.shape[-1]} cannot be compared; extract both with the "
            "same model"
        )


def bootstrap_interval(
    num_images: int,
    statistic: Callable[[torch.Tensor], float],
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> list[float]:
    """The percentile interval of a statistic of images under resampling of the images.

    Args:
        num_images: Number of images.
        statistic: Maps indices `(num_images,)` of resampled images to a value.
        samples: Number of resamplings.

    Returns:
        The lower and the upper end.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.tensor(
        [statistic(torch.randint(num_images, (num_images,), generator=generator)) for _ in range(samples)],
        dtype=torch.float64,
    )
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    return draws.quantile(ends).tolist()


def mean_interval(values: Sequence[float] | torch.Tensor, samples: int = 1000, seed: int = 0) -> list[float]:
    """The 95% bootstrap interval of the mean of one value for each image."""
    values = torch.as_tensor(values, dtype=torch.float64)
    return bootstrap_interval(len(values), lambda rows: values[rows].mean().item(), samples, seed=seed)


def distance_interval(
    distance: Callable[[torch.Tensor, torch.Tensor], float],
    first: torch.Tensor,
    second: torch.Tensor,
    value: float,
    samples: int,
    max_images: int | None = None,
    minimum: float = -math.inf,
    paired: bool = False,
    seed: int = 0,
) -> list[float]:
    """The 95% interval of a distance of two sets: the value ± 1.96 standard errors, by resampling both sets.

    A resampled set repeats images, which adds to a distance the bias of a smaller set. The percentiles of resampled
    distances therefore lie above the value; their spread does not have that bias.

    Args:
        distance: Of features `(N, width)` and `(M, width)`.
        value: The distance of the two sets.
        samples: Number of resamplings.
        max_images: The most images of a resampled set. The standard error of fewer images than there are is scaled by
            the root of their share.
        minimum: The least value that the distance can have, where the interval ends.
        paired: Whether row `i` of both sets belongs to one input. Both sets are then resampled alike.
    """
    generator = torch.Generator().manual_seed(seed)
    limit = max_images or max(len(first), len(second))
    share = min(1.0, limit / min(len(first), len(second)))
    draws = []
    for _ in range(samples):
        rows = [torch.randint(len(f), (min(len(f), limit),), generator=generator) for f in (first, second)]
        draws.append(distance(first[rows[0]], second[rows[0] if paired else rows[1]]))
    error = 1.96 * torch.tensor(draws, dtype=torch.float64).std().item() * share**0.5
    return [max(value - error, minimum), value + error]
