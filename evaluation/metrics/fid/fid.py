"""Fréchet distance of two sets of image features: FID with the 2048 features of Inception-v3, FD with any others."""

from vlv.evaluation import distances, modules


class FrechetDistance(modules.FeatureDistance):
    citation = "Heusel et al., GANs Trained by a Two Time-Scale Update Rule, 2017, arXiv:1706.08500"

    def distance(self, generated, reference):
        return distances.frechet_distance(generated, reference)
