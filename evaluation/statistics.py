"""Statistics of image features: counted batch by batch, added over processes, saved, and refused where stale."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vlv.files import write_atomically


@dataclass
class FeatureStatistics:
    """The number, mean and scatter of features, in float64, and the features themselves.

    Batches are added with `update`, the statistics of other images with `+`. Both are accurate whatever the mean,
    since the scatter is taken about the mean (Chan et al., 1979).

    Args:
        count: Number of images. None in statistics of another tool that does not record it.
        mean: `(width,)` float64.
        scatter: Sum of the outer products of deviations from the mean, `(width, width)` float64.
        chunks: The features, each `(n, width)` float32, for the distances that need them. Empty if they are not kept.
        keep_features: Whether `update` keeps the features: 8 KB an image at a width of 2048.
    """

    count: int | None = 0
    mean: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    scatter: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
    chunks: list[torch.Tensor] = field(default_factory=list)
    keep_features: bool = True

    @classmethod
    def of(cls, features: torch.Tensor, keep_features: bool = True) -> "FeatureStatistics":
        """The statistics of features `(N, width)`.

        Raises:
            ValueError: If they are not a matrix, or not finite.
        """
        if features.ndim != 2 or not len(features):
            raise ValueError(f"expected features (N, width) of at least one image, got {tuple(features.shape)}")
        if not features.isfinite().all():
            raise ValueError("the features of an image are not finite; extract them in float32")
        exact = features.detach().cpu().double()
        mean = exact.mean(0)
        deviations = exact - mean  # (N, width)
        chunks = [features.detach().cpu().float()] if keep_features else []
        return cls(len(exact), mean, deviations.T @ deviations, chunks, keep_features)

    def update(self, features: torch.Tensor) -> None:
        """Adds a batch of features `(N, width)`."""
        total = self + FeatureStatistics.of(features, self.keep_features)
        self.count, self.mean, self.scatter, self.chunks = total.count, total.mean, total.scatter, total.chunks

    def __add__(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """The statistics of the images of both.

        Raises:
            ValueError: If the features have different widths, or one of them has no count.
        """
        keep = self.keep_features and other.keep_features
        if self.count is None or other.count is None:
            raise ValueError("statistics that do not record their number of images cannot be added")
        if not self.count or not other.count:
            one = self if self.count else other
            return FeatureStatistics(one.count, one.mean, one.scatter, list(one.chunks) if keep else [], keep)
        if self.width != other.width:
            raise ValueError(f"features of width {self.width} and {other.width} cannot be added")
        count = self.count + other.count
        shift = other.mean - self.mean
        return FeatureStatistics(
            count,
            self.mean + shift * (other.count / count),
            self.scatter + other.scatter + torch.outer(shift, shift) * (self.count * other.count / count),
            [*self.chunks, *other.chunks] if keep else [],
            keep,
        )

    @property
    def width(self) -> int:
        """The number of dimensions of a feature."""
        return len(self.mean)

    @property
    def covariance(self) -> torch.Tensor:
        """The unbiased covariance, `(width, width)` float64.

        Raises:
            ValueError: If there are fewer than 2 images.
        """
        if self.count is None:
            return self.scatter
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        return self.scatter / (self.count - 1)

    @property
    def features(self) -> torch.Tensor:
        """The features, `(count, width)` float32.

        Raises:
            ValueError: If they were not kept.
        """
        if not self.chunks:
            raise ValueError("these statistics hold no features, only their mean and covariance")
        return torch.cat(self.chunks)

    def save(self, path: str | os.PathLike, fingerprint: str, extractor: str) -> None:
        """Writes a .safetensors file.

        Args:
            fingerprint: Of the images, see `fingerprint_images`.
            extractor: Fingerprint of the feature extractor.
        """
        tensors = {"mean": self.mean, "scatter": self.scatter}
        if self.chunks:
            tensors["features"] = self.features
        metadata = {"format": FORMAT, "count": str(self.count), "images": fingerprint, "extractor": extractor}
        write_atomically(Path(path), lambda temporary: save_file(tensors, temporary, metadata))

    @classmethod
    def load(
        cls, path: str | os.PathLike, *, extractor: str | None = None, fingerprint: str | None = None
    ) -> "FeatureStatistics":
        """Reads what `save` wrote, or the `.npz` of pytorch-fid, which holds `mu` and `sigma` of Inception features.

        Args:
            extractor: The fingerprint that the extractor must have had, where it is known.
            fingerprint: The fingerprint that the images must have had, where they are at hand.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is another file, or of other images or another extractor; the message names the file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there are no statistics at {path}")
        if path.suffix == ".npz":
            return cls._load_npz(path)
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read as statistics of features: {error}") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} holds no statistics of features; `vlv evaluate images` writes such files")
        for what, expected in (("extractor", extractor), ("images", fingerprint)):
            if expected is not None and metadata[what] != expected:
                raise ValueError(
                    f"{path} is stale: its {what} had the fingerprint {metadata[what][:12]}, not {expected[:12]}; "
                    "delete it to have it written again, or pass another file"
                )
        chunks = [tensors["features"]] if "features" in tensors else []
        return cls(int(metadata["count"]), tensors["mean"], tensors["scatter"], chunks, bool(chunks))

    @classmethod
    def _load_npz(cls, path: Path) -> "FeatureStatistics":
        try:
            with np.load(path) as content:
                mean, covariance = torch.from_numpy(content["mu"]), torch.from_numpy(content["sigma"])
        except (KeyError, ValueError, OSError) as error:
            raise ValueError(
                f"{path} must hold the arrays mu and sigma, as pytorch-fid writes them: {error}"
            ) from error
        if covariance.shape != (len(mean), len(mean)):
            raise ValueError(f"{path}: mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)} do not fit")
        return cls(None, mean.double(), covariance.double(), [], False)


FORMAT = "vlv feature statistics 1"


def gather_statistics(part: FeatureStatistics) -> FeatureStatistics:
    """The sum of the statistics of all processes of `torch.distributed`, in each of them; `part` itself without any.

    Process `r` of `n` holds the images `r`, `r + n`, `r + 2 n` and so on; the features are in the order of the images.
    """
    if not torch.distributed.is_initialized():
        return part
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, part)
    total = sum(parts, FeatureStatistics(keep_features=part.keep_features))
    if total.chunks:
        features = torch.empty(total.count or 0, total.width)
        for rank, other in enumerate(parts):
            if other.count:
                features[rank :: len(parts)] = other.features
        total.chunks = [features]
    return total


def process_shard(items: Sequence[Any]) -> Sequence[Any]:
    """The items of this process of `torch.distributed`, in the order that `gather_statistics` expects."""
    if not torch.distributed.is_initialized():
        return items
    return items[torch.distributed.get_rank() :: torch.distributed.get_world_size()]
