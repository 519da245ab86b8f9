"""The diffusion score in commands: its options, its loading, and what is said about a batch of captions."""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence

import torch

from vlv.captioning.batches import Batch
from vlv.captioning.output import Summary
from vlv.pipelines import DiffusionScorer, load_reconstruction, to_pixels

from .models import choose_device, loading, precision


class BatchScorer:
    """Scores the captions of batches, and counts what the text encoder cannot read at once.

    Args:
        source: Folder or repo id of the model.
        arguments: With `revision`, `dtype`, `device` and `num_pairs`.

    Raises:
        UserError: If the model cannot be loaded, or has no text-to-image model.
    """

    def __init__(self, source: str, arguments: argparse.Namespace):
        with loading(source):
            self.pipeline = load_reconstruction(
                source, revision=arguments.revision, dtype=precision(arguments), device=choose_device(arguments)
            )
            self.scorer = DiffusionScorer.from_pipeline(self.pipeline, num_pairs=arguments.num_pairs)
        self.image_size: int = self.pipeline.default_size
        self._counts: Counter[str] = Counter()

    def score(
        self, batch: Batch, captions: Sequence[Sequence[str]], summary: Summary, partial: bool = False
    ) -> list[list[float] | None]:
        """The scores of the captions of each image, of which each may have another number.

        Args:
            batch: With originals of `image_size`.
            captions: Of each image, at least one.
            summary: Records an image as failed of whose scores one is not finite; its scores are None.
            partial: Whether such a score is -inf, and an image fails only if it has no other.
        """
        scores: list[list[float] | None] = [None] * len(captions)
        for count in sorted({len(own) for own in captions}):
            places = [place for place, own in enumerate(captions) if len(own) == count]
            pixels = to_pixels([image for place in places if (image := batch.originals[place]) is not None])
            found = self.scorer.score(pixels, [captions[place] for place in places], allow_nan=True)
            self._counts["split"] += int((found.num_texts > 1).sum())
            self._counts["cut"] += int(found.num_cut.sum())
            for place, row in zip(places, found.scores, strict=True):
                finite = torch.isfinite(row)
                if partial and finite.any():
                    self._counts["not_finite"] += int((~finite).sum())
                    row = row.where(finite, -torch.inf)
                    finite = finite.new_ones(())
                if finite.all():
                    scores[place] = [round(value, 6) for value in row.tolist()]
                else:
                    reason = "the loss is not finite; if the precision is float16, pass --dtype bfloat16 or float32"
                    summary.fail(batch.names[place], reason, "score the captions of")
        return scores

    def print_notes(self) -> None:
        """Says on standard error how many captions have no score, and how many were split or cut as too long."""
        if count := self._counts["not_finite"]:
            print(f"note: {count} captions have no score, since their loss is not finite", file=sys.stderr)
        if not self._counts["split"] and not self._counts["cut"]:
            return
        positions = self.scorer.model.config.num_text_positions
        print(
            f"note: the text encoder reads {positions} tokens at once: {self._counts['split']} captions, which are "
            f"longer or of an image with a longer one, are scored sentence by sentence, and {self._counts['cut']} "
            "sentences are cut",
            file=sys.stderr,
        )
