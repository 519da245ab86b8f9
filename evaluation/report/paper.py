"""The paper's figures of VLV that belong beside those of a run that asks a model."""

from ..protocols import PUBLISHED_ARENA, PUBLISHED_VQA
from .runs import Run


def published_accuracy(run: Run, prompt: str) -> float | None:
    """Of a prompt of `vlv evaluate vqa`, such as `4 shots, captions`, in percent."""
    shots, _, context = prompt.partition(" shots, ")
    values = PUBLISHED_VQA.get(str(run.config.get("benchmark")), {})
    return values.get(int(shots)) if context == "captions" and shots.isdecimal() else None


def published_score(run: Run) -> float | None:
    """Of `vlv evaluate judge`; None for comparisons of two captioners."""
    return None if run.config.get("against") else PUBLISHED_ARENA
