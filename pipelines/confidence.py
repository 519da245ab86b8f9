"""Marks captions that explain an image hardly better than no words, by their diffusion score."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from .diffusion_score import DiffusionScorer, to_pixels
from .loading import ReconstructionPipeline


def mark_confidence(entry: Mapping[str, Any], min_score: float) -> dict[str, Any]:
    """A caption with its `score`, and whether it is `confident`: whether the score is at least `min_score`."""
    return {**entry, "confident": entry["score"] >= min_score} if "score" in entry else dict(entry)


class ConfidenceMarker:
    """Scores captions of single images.

    Args:
        pipeline: With its text-to-image model.
        min_score: Lowest score of a confident caption.
        settings: Of the `DiffusionScorer`.

    Raises:
        ValueError: As `DiffusionScorer.from_pipeline`.
    """

    def __init__(self, pipeline: ReconstructionPipeline, min_score: float, **settings: Any):
        self.scorer = DiffusionScorer.from_pipeline(pipeline, **settings)
        self.min_score, self.image_size = min_score, pipeline.default_size

    def mark(self, image: Image.Image, caption: str) -> dict[str, Any]:
        """`caption`, `score` and `confident`.

        Args:
            image: Upright RGB, as the image processor's `load` returns it.

        Raises:
            ValueError: If the score is not finite.
        """
        scores = self.scorer.score(resized_pixels([image], self.image_size), [[caption]]).scores
        return mark_confidence({"caption": caption, "score": round(scores.item(), 6)}, self.min_score)

    def describe(self, marked: Mapping[str, Any]) -> str:
        """What `mark` found, in Markdown, for people who read the caption."""
        score = marked["score"]
        if marked["confident"]:
            return f"Score {score:.2f}: these words explain the image better than no words."
        return (
            f"**⚠ Low confidence.** The score, {score:.2f}, is below {self.min_score:g}: these words explain the "
            "image hardly better than no words. The image may be of a kind that the model does not know."
        )


def resized_pixels(images: Sequence[Image.Image], size: int) -> Any:
    """RGB images as `(N, 3, size, size)` uint8, in the way in which `vlv score` resizes them."""
    return to_pixels([image.resize((size, size), Image.Resampling.BICUBIC) for image in images])
