"""The scores of scenes as figures of `vlv evaluate`, with a value for each image and intervals."""

from collections.abc import Sequence
from functools import partial

import torch

from vlv.evaluation.caption_sets import Measured

from .grammar import parse_caption
from .metrics import METRICS
from .scoring import ASPECTS, count_agreement
from .world import Scene


def measure_agreement(predicted: Sequence[Scene], true: Sequence[Scene]) -> Measured:
    """The scores of `scoring.score_scenes`, by the same keys.

    Args:
        predicted: One scene for each of `true`.
    """
    counts = [count_agreement(p, t) for p, t in zip(predicted, true, strict=True)]
    measured = Measured()
    for key, label in METRICS.items():
        own = [scene[key] for scene in counts]
        if key in ASPECTS:
            measured.statistics[key] = label, partial(_ratio, torch.tensor(own, dtype=torch.float64).reshape(-1, 2))
        else:
            measured.means[key] = label, [float(agreeing) for agreeing, _ in own]
    return measured


def measure_captions(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Measured:
    """How well the scenes of captions agree with those of the first reference of each, both as the grammar reads them.

    Raises:
        ValueError: If a reference describes no scene of the miniature.
    """
    true = [parse_caption(texts[0]) for texts in references]
    for scene, texts in zip(true, references, strict=True):
        if not scene.objects and scene.background is None:
            raise ValueError(
                f"the reference {texts[0]!r} describes no scene of the miniature; pass true captions, such as "
                "references.json of `vlv evaluate miniature --images-dir`"
            )
    return measure_agreement([parse_caption(caption) for caption in captions], true)


def _ratio(counts: torch.Tensor, rows: torch.Tensor) -> float:
    agreeing, total = counts[rows].sum(0).tolist()
    return agreeing / total if total else 0.0
