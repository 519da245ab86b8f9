"""LPIPS (AlexNet) of images and their originals: 0 for equal ones. Needs the package lpips."""

from vlv.evaluation import image_similarity, modules


class LPIPS(modules.ImagePairs):
    citation = (
        "Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, 2018, arXiv:1801.03924"
    )

    def measure(self):
        return image_similarity.perceptual_distance("lpips")
