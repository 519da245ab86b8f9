"""Mean cosine of the features of images and their originals: CLIP-I with CLIP, DINO similarity with DINOv2."""

from vlv.evaluation import image_sets, modules


class FeatureCosine(modules.Module):
    predictions = references = modules.FEATURE

    def _compute(self, predictions, references):
        scores = image_sets.cosine_similarities(modules.matrix(predictions), modules.matrix(references))
        return {"feature_cosine": sum(scores) / len(scores), "scores": scores}
