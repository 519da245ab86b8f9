"""Similarity of two images (PSNR, SSIM) and of two sets of images (FID, KID), computed by torchmetrics."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

MIN_IMAGES_FOR_FID = 2048
"""The width of Inception features. The covariance of fewer images does not have full rank."""


def _torchmetrics() -> Any:
    try:
        import torchmetrics
    except ImportError as error:
        raise ImportError("metrics need the extra vlv[eval] (pip install '.[eval]' in its source folder)") from error
    return torchmetrics


def image_metrics(image: torch.Tensor, original: torch.Tensor) -> dict[str, float]:
    """`psnr` in dB and `ssim` of one image against its original.

    Args:
        image: `(3, H, W)` float in 0..1.
        original: Like `image`.

    Raises:
        ImportError: If torchmetrics is not installed.
        ValueError: If the shapes differ or are not `(3, H, W)`.
    """
    if image.shape != original.shape or image.ndim != 3:
        raise ValueError(f"expected two (3, H, W) images, got {tuple(image.shape)} and {tuple(original.shape)}")
    functional = _torchmetrics().functional.image
    pair = image[None].float(), original[None].float()
    psnr = functional.peak_signal_noise_ratio(*pair, data_range=1.0)
    ssim = functional.structural_similarity_index_measure(*pair, data_range=1.0)
    return {"psnr": round(psnr.item(), 4), "ssim": round(ssim.item(), 4)}


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
        features: Maps uint8 images to `(N, width)` features on the CPU. The default is torch-fidelity's Inception.
        features_name: The `features` of the result, since values of different features cannot be compared. By default
            the name of the class.

    Raises:
        ImportError: If torchmetrics is not installed.
    """

    def __init__(self, features: nn.Module | None = None, features_name: str = ""):
        _torchmetrics()
        from torchmetrics.image.fid import FrechetInceptionDistance  # torchmetrics.image: only with torch-fidelity
        from torchmetrics.image.kid import KernelInceptionDistance

        feature: Any = 2048 if features is None else features
        self.features = features_name or (
            "Inception-v3, 2048 features" if features is None else type(features).__name__
        )
        self.fid = FrechetInceptionDistance(feature=feature)
        with warnings.catch_warnings():  # torchmetrics warns that it keeps all features; they are small beside images
            warnings.filterwarnings("ignore", message="Metric .* will save all extracted features")
            self.kid = KernelInceptionDistance(feature=feature, subset_size=2, subsets=10)
        self.num_images = 0

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
        for metric in (self.fid, self.kid):
            metric.update(originals, real=True)
            metric.update(images, real=False)
        self.num_images += len(images)

    def compute(self) -> SetMetrics:
        """FID and KID of all images so far."""
        if self.num_images < 2:
            return SetMetrics(self.features, self.num_images, None, None, "FID and KID need at least 2 images")
        self.kid.subset_size = min(self.num_images, 1000)
        with torch.random.fork_rng():  # KID samples random subsets
            torch.manual_seed(0)
            kid = self.kid.compute()[0].item()
        fid = self.fid.compute().item()
        if self.num_images < MIN_IMAGES_FOR_FID:
            note = (
                f"FID and KID of {self.num_images} images are not meaningful; use at least {MIN_IMAGES_FOR_FID} images"
            )
        else:
            note = "comparable only with values of the same features and the same number of images"
        return SetMetrics(self.features, self.num_images, round(fid, 4), round(kid, 6), note)


class EncoderFeatures(nn.Module):
    """The mean image token of a VLV's vision tower: features for FID and KID if Inception is not available."""

    def __init__(self, encoder: Any, image_processor: Any):
        super().__init__()
        self.encoder, self.image_processor = encoder, image_processor
        self.num_features = encoder.config.query_token_dim

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features `(N, width)` float32 of images `(N, 3, H, W)` uint8."""
        pixels = self.image_processor(list(images.cpu()), return_tensors="pt").pixel_values
        return (
            self.encoder.get_image_features(pixels.to(self.encoder.device)).pooler_output[:, 0].float().cpu()
        )  # (N, width)


def inception_is_available() -> bool:
    """Whether torch-fidelity and its Inception weights are installed, so that nothing has to be downloaded."""
    from pathlib import Path

    try:
        import torch_fidelity  # noqa: F401
    except ImportError:
        return False
    return any((Path(torch.hub.get_dir()) / "checkpoints").glob("weights-inception-2015-12-05-*.pth"))
