"""Squared MMD of image features with a Gaussian kernel, times 1000: CMMD with the image embeddings of CLIP."""

from vlv.evaluation import distances, modules


class GaussianMMD(modules.FeatureDistance):
    citation = "Jayasumana et al., Rethinking FID, 2024, arXiv:2401.09603"

    def distance(self, generated, reference):
        return distances.gaussian_mmd(generated.features, reference.features)
