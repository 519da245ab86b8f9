"""CIDEr-D of captions, 0 to 10, as coco-caption computes it, without Java."""

from vlv.evaluation import caption_metrics, modules


class CIDErD(modules.CaptionsWithReferences):
    citation = "Vedantam et al., CIDEr, 2015, arXiv:1411.5726"

    scores = staticmethod(caption_metrics.cider_d)
