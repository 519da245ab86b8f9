"""BLEU-1 to BLEU-4 of all captions together, 0 to 1, not smoothed."""

from vlv.evaluation import caption_metrics, modules


class BLEU(modules.Module):
    predictions, references = modules.TEXT, modules.TEXTS
    citation = "Papineni et al., BLEU, 2002"

    def _compute(self, predictions, references):
        bleu = caption_metrics.Bleu(list(predictions), [list(texts) for texts in references])
        return {f"bleu_{order}": bleu.score(order) for order in range(1, 5)}
