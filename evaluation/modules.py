"""The metrics as modules of the `evaluate` library. The scripts in `evaluation/metrics/` name and describe them.

A script is loaded by the path of its folder, without a network: `evaluate.load("evaluation/metrics/fid")`. It needs
vlv with the extra vlv[eval].
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from .features import AutoModelFeatures
from .statistics import FeatureStatistics

FEATURE = datasets.Sequence(datasets.Value("float32"))
TEXT, TEXTS = datasets.Value("string"), datasets.Sequence(datasets.Value("string"))
IMAGE = datasets.Image()


class Module(evaluate.Metric):
    """A metric whose class says what it takes. Its description is the docstring of its script.

    Attributes:
        predictions: The type of one prediction.
        references: The type of one reference; None if there are none.
        citation: The paper that defines it.
    """

    predictions: Any
    references: Any = None
    citation = ""

    @property
    def key(self) -> str:
        """The name of the value in the result: that of the script."""
        return type(self).__module__.rpartition(".")[2]

    def _info(self) -> evaluate.MetricInfo:
        inputs = {"predictions": self.predictions, "references": self.references}
        return evaluate.MetricInfo(
            description=sys.modules[type(self).__module__].__doc__ or "",
            citation=self.citation,
            inputs_description=self._compute.__doc__ or "",
            features=datasets.Features({name: kind for name, kind in inputs.items() if kind is not None}),
        )


class FeatureDistance(Module):
    """A distance of two sets of features."""

    predictions = references = FEATURE

    def distance(self, generated: FeatureStatistics, reference: FeatureStatistics) -> float:
        raise NotImplementedError

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> Any:
        """The distance of two sets, which need not have the same number of images."""
        # `evaluate` stores both in one table, whose columns must have one length; two sets of images need not.
        if predictions is not None and references is not None and len(predictions) != len(references):
            return self._compute(predictions=predictions, references=references, **kwargs)
        return super().compute(predictions=predictions, references=references, **kwargs)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:  # type: ignore[override]
        """Args:
        predictions: Features of the generated images, `(N, width)`.
        references: Features of the reference images, `(M, width)`.
        """
        sets = [FeatureStatistics.of(matrix(features)) for features in (predictions, references)]
        return {self.key: self.distance(*sets)}


class ImagePairs(Module):
    """The mean of a metric of each image and its original."""

    predictions = references = IMAGE

    def measure(self) -> Callable[[torch.Tensor, torch.Tensor], float]:
        """The metric of two images `(3, H, W)` float in 0..1."""
        raise NotImplementedError

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:  # type: ignore[override]
        """Args:
        predictions: Generated images.
        references: Their originals, of the same sizes.
        """
        metric = self.measure()
        pairs = zip(predictions, references, strict=True)
        return {self.key: float(np.mean([metric(_pixels(a), _pixels(b)) for a, b in pairs]))}


class CaptionsWithReferences(Module):
    """A metric of captions against references by people.

    Attributes:
        scores: Maps captions and lists of references to one value for each caption.
    """

    predictions, references = TEXT, TEXTS
    scores: Callable[..., list[float]]

    def _compute(self, predictions: Any, references: Any, **settings: Any) -> dict[str, Any]:  # type: ignore[override]
        """Args:
        predictions: One caption for each image.
        references: One list of captions by people for each image.

        Returns:
            The mean, and `scores`, one for each caption.
        """
        scores = self.scores(list(predictions), [list(texts) for texts in references], **settings)
        return {self.key: float(np.mean(scores)), "scores": scores}


def matrix(features: Any) -> torch.Tensor:
    """Features `(N, width)` as one tensor."""
    return torch.as_tensor(np.array(list(features)))


def clip_features(model: str, images: Sequence[Any]) -> tuple[AutoModelFeatures, torch.Tensor]:
    """A CLIP model and its features of PIL images."""
    clip = AutoModelFeatures(model)
    return clip, clip([(_pixels(image) * 255).round().to(torch.uint8) for image in images])


def _pixels(image: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
