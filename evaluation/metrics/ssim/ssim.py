"""Structural similarity of images and their originals, at most 1."""

from vlv.evaluation import image_similarity, modules


class SSIM(modules.ImagePairs):
    citation = "Wang et al., Image Quality Assessment, 2004"

    def measure(self):
        return lambda image, original: image_similarity.image_metrics(image, original, ["ssim"])["ssim"]
