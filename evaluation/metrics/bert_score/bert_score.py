"""BERTScore (F1) of captions with their best reference, by the text encoder `model`, not rescaled."""

from vlv.evaluation import caption_metrics, modules


class BERTScore(modules.CaptionsWithReferences):
    citation = "Zhang et al., BERTScore, 2020, arXiv:1904.09675"

    scores = staticmethod(caption_metrics.bert_score)
