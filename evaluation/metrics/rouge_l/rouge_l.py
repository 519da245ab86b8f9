"""ROUGE-L (F1) of captions with their best reference, 0 to 1."""

from vlv.evaluation import caption_metrics, modules


class ROUGEL(modules.CaptionsWithReferences):
    citation = "Lin, ROUGE, 2004"

    scores = staticmethod(caption_metrics.rouge_l)
