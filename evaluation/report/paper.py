"""The paper's figures of VLV that belong beside those of a run."""

from collections.abc import Mapping

from .. import cycle, reconstruction, spatial
from ..protocols import PUBLISHED_ARENA, PUBLISHED_VQA
from .runs import Run


def published_by_guidance(run: Run) -> Mapping[str, Mapping[float, float]]:
    """Of a run of `vlv evaluate cycle`, `reconstruction` or `spatial`: by the label of the figure and guidance."""
    config = run.config
    if "text_to_image" in config:
        return {"FID": cycle.PAPER_FID}
    if "counts" in config or "model" not in config:  # `vlv evaluate composition` has no figures in the paper
        return {}
    if "detector" in config:
        in_3d = any("angle" in figures for figures in run.content["metrics"].values())
        values = spatial.PAPER if in_3d else {}
        return {spatial.LABELS[key]: {spatial.PAPER_GUIDANCE: value} for key, value in values.items()}
    return {"FID": reconstruction.PAPER_FID}


def published_accuracy(run: Run, prompt: str) -> float | None:
    """Of a prompt of `vlv evaluate vqa`, such as `4 shots, captions`, in percent."""
    shots, _, context = prompt.partition(" shots, ")
    values = PUBLISHED_VQA.get(str(run.config.get("benchmark")), {})
    return values.get(int(shots)) if context == "captions" and shots.isdecimal() else None


def published_score(run: Run) -> float | None:
    """Of `vlv evaluate judge`; None for comparisons of two captioners."""
    return None if run.config.get("against") else PUBLISHED_ARENA
