"""Unbiased squared MMD of image features with a cubic kernel: KID with the features of Inception-v3."""

from vlv.evaluation import distances, modules


class KernelDistance(modules.FeatureDistance):
    citation = "Binkowski et al., Demystifying MMD GANs, 2018, arXiv:1801.01401"

    def distance(self, generated, reference):
        return distances.kernel_distance(generated.features, reference.features)
