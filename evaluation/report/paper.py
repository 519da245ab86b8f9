"""The paper's figures of VLV that belong beside those of a run that asks a model."""

from .. import published
from ..protocols import PUBLISHED_VQA
from .runs import Run


def published_accuracy(run: Run, prompt: str) -> float | None:
    """Of a prompt of `vlv evaluate vqa`, such as `4 shots, captions`, in percent."""
    shots, _, context = prompt.partition(" shots, ")
    values = PUBLISHED_VQA.get(str(run.config.get("benchmark")), {})
    return values.get(int(shots)) if context == "captions" and shots.isdecimal() else None


def published_score(run: Run) -> tuple[str, str] | None:
    """Of `vlv evaluate judge`, the label and the score of the row that `paper` names; None for comparisons of two
    captioners, and without a row.
    """
    return None if run.config.get("against") else published.published_score(run.config.get("paper"))
