"""Similarity of an image and its original (PSNR, SSIM, LPIPS, DreamSim), and of two sets that arrive in batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .distances import frechet_distance, kernel_distance
from .features import FeatureExtractor, InceptionFeatures, require
from .statistics import FeatureStatistics

MIN_IMAGES_FOR_FID = 2048
"""The width of Inception features. The covariance of fewer images does not have full rank."""

MIN_SSIM_SIZE = 6
"""The padding of SSIM's window of 11 pixels is 5, and has to be smaller than the image."""


def image_metrics(
    image: torch.Tensor, original: torch.Tensor, metrics: Sequence[str] = ("psnr", "ssim")
) -> dict[str, float]:
    """`psnr` in dB and `ssim` of one image against its original.

    Args:
        image: `(3, H, W)` float in 0..1.
        original: Like `image`.
        metrics: Which of the two.

    Raises:
        ImportError: If torchmetrics is not installed.
        ValueError: If the shapes differ or are not `(3, H, W)`, or the images are too small for SSIM.
    """
    if image.shape != original.shape or image.ndim != 3:
        raise ValueError(f"expected two (3, H, W) images, got {tuple(image.shape)} and {tuple(original.shape)}")
    functional = require("torchmetrics").functional.image
    pair = image[None].float(), original[None].float()
    found = {}
    if "psnr" in metrics:
        found["psnr"] = functional.peak_signal_noise_ratio(*pair, data_range=1.0)
    if "ssim" in metrics:
        height, width = image.shape[1:]
        if min(height, width) < MIN_SSIM_SIZE:
            raise ValueError(
                f"SSIM needs images of at least {MIN_SSIM_SIZE} x {MIN_SSIM_SIZE} pixels, got {width} x {height}"
            )
        found["ssim"] = functional.structural_similarity_index_measure(*pair, data_range=1.0)
    return {name: round(value.item(), 4) for name, value in found.items()}


def perceptual_distance(
    name: str, device: str | torch.device = "cpu"
) -> Callable[[torch.Tensor, torch.Tensor], float]:
    """`"lpips"` (AlexNet) or `"dreamsim"` of two images `(3, H, W)` float in 0..1, by the package of that name.

    The packages need torchvision, and their first use loads weights of the network behind the metric.

    Raises:
        ImportError: If the package is not installed.
    """
    package = require(name, f"pip install {name}")
    if name == "lpips":
        network = package.LPIPS(net="alex", verbose=False).to(device).eval()

        def lpips(image: torch.Tensor, original: torch.Tensor) -> float:
            with torch.no_grad():
                return network(image[None].to(device), original[None].to(device), normalize=True).item()

        return lpips
    network, preprocess = package.dreamsim(pretrained=True, device=str(device))

    def dreamsim(image: torch.Tensor, original: torch.Tensor) -> float:
        from torchvision.transforms.functional import to_pil_image

        pair = (preprocess(to_pil_image(picture)).to(device) for picture in (image, original))
        with torch.no_grad():
            return network(*pair).item()

    return dreamsim


@dataclass
class SetMetrics:
    """FID and KID between two sets of images.

    Attributes:
        features: Name of the features that were compared.
        num_images: Number of images in each set.
        fid: None if there are fewer than 2 images.
        kid: None if there are fewer than 2 images.
        note: How far the values can be trusted and compared.
    """

    features: str
    num_images: int
    fid: float | None
    kid: float | None
    note: str


class SetMeter:
    """Computes FID and KID between two sets of images that arrive in batches. Only their features are kept.

    Args:
        features: The default is `InceptionFeatures`.
        features_name: The `features` of the result, since values of different features cannot be compared. By default
            the name of the extractor.

    Raises:
        ImportError: If the extra vlv[eval] is not installed, which the metrics of each image need as well, or
            Inception is not, where it is chosen.
    """

    def __init__(self, features: FeatureExtractor | None = None, features_name: str = ""):
        require("torchmetrics")
        self.extractor = InceptionFeatures() if features is None else features
        self.features = features_name or self.extractor.name
        self.images, self.originals = FeatureStatistics(), FeatureStatistics()

    def update(self, images: torch.Tensor, originals: torch.Tensor) -> None:
        """Adds a batch of images and their originals.

        Args:
            images: `(N, 3, H, W)` uint8.
            originals: Like `images`.

        Raises:
            ValueError: If the shape or dtype is another, or the numbers of images differ.
        """
        for name, batch in (("images", images), ("originals", originals)):
            if batch.ndim != 4 or batch.shape[1] != 3 or batch.dtype != torch.uint8:
                raise ValueError(f"{name} must be (N, 3, H, W) uint8, got {tuple(batch.shape)} {batch.dtype}")
        if len(images) != len(originals):
            raise ValueError(
                f"expected one original for each image, got {len(images)} images and {len(originals)} originals"
            )
        features, original_features = self.extractor([*images, *originals]).chunk(2)  # one batch of both
        self.images.update(features)
        self.originals.update(original_features)

    def compute(self) -> SetMetrics:
        """FID and KID of all images so far."""
        count = self.images.count or 0
        if count < 2:
            return SetMetrics(self.features, count, None, None, "FID and KID need at least 2 images")
        fid = frechet_distance(self.images, self.originals)
        kid = kernel_distance(self.images.features, self.originals.features)
        if count < MIN_IMAGES_FOR_FID:
            note = f"FID and KID of {count} images are not meaningful; use at least {MIN_IMAGES_FOR_FID} images"
        else:
            note = "comparable only with values of the same features and the same number of images"
        return SetMetrics(self.features, count, round(fid, 4), round(kid, 6), note)
