"""DreamSim of images and their originals: 0 for equal ones. Needs the package dreamsim."""

from vlv.evaluation import image_similarity, modules


class DreamSim(modules.ImagePairs):
    citation = "Fu et al., DreamSim, 2023, arXiv:2306.09344"

    def measure(self):
        return image_similarity.perceptual_distance("dreamsim")
