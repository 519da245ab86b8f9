"""Peak signal-to-noise ratio of images and their originals, in dB."""

from vlv.evaluation import image_similarity, modules


class PSNR(modules.ImagePairs):
    citation = "10 log10(1 / mean squared error)"

    def measure(self):
        return lambda image, original: image_similarity.image_metrics(image, original, ["psnr"])["psnr"]
