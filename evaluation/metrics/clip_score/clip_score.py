"""CLIPScore of captions of images, 0 to 2.5, by the CLIP model `model`."""

from vlv.evaluation import caption_metrics, modules


class CLIPScore(modules.Module):
    predictions, references = modules.TEXT, modules.IMAGE
    citation = "Hessel et al., CLIPScore, 2021, arXiv:2104.08718"

    def _compute(self, predictions, references, model):
        """Args:
        predictions: One caption for each image.
        references: The images.
        model: Folder or Hub repo id of a CLIP or SigLIP model.
        """
        clip, images = modules.clip_features(model, list(references))
        scores = caption_metrics.clip_scores(clip, list(predictions), images)["clip_score"]
        return {"clip_score": sum(scores) / len(scores), "scores": scores}
