"""CHAIR: the objects that captions mention and their images do not have, as shares of mentions and of captions."""

from vlv.evaluation import caption_metrics, modules


class CHAIR(modules.Module):
    predictions, references = modules.TEXT, modules.TEXTS
    citation = "Rohrbach et al., Object Hallucination in Image Captioning, 2018, arXiv:1809.02156"

    def _compute(self, predictions, references, vocabulary):
        """Args:
        predictions: One caption for each image.
        references: The objects of each image.
        vocabulary: Of each object its synonyms.
        """
        chair = caption_metrics.Chair(vocabulary)
        return caption_metrics.chair_scores(chair.count(list(predictions), [list(names) for names in references]))
