"""Of captions alone: words, repetition of sequences of 4 words, distinct-1 and distinct-2."""

from statistics import fmean

from vlv.evaluation import caption_metrics, modules


class CaptionStatistics(modules.Module):
    predictions = modules.TEXT

    def _compute(self, predictions):
        captions = list(predictions)
        return {
            "words": fmean(caption_metrics.lengths(captions)),
            "repetition_4": fmean(caption_metrics.repetition(captions)),
            "distinct_1": caption_metrics.distinct(captions, 1),
            "distinct_2": caption_metrics.distinct(captions, 2),
        }
