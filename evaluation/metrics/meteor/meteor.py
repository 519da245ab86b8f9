"""METEOR of captions, 0 to 1, by nltk: with synonyms only where nltk's WordNet is installed."""

from vlv.evaluation import caption_metrics, modules


class METEOR(modules.CaptionsWithReferences):
    citation = "Banerjee and Lavie, METEOR, 2005"

    scores = staticmethod(caption_metrics.meteor)
