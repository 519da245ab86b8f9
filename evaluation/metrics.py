"""How like two pictures, or two sets of pictures, are. The measuring is torchmetrics'."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

FID_MEANINGFUL = 2048
"""Inception features are 2048 wide: below so many pictures their covariance cannot even have full rank."""


def _torchmetrics() -> Any:
    try:
        import torchmetrics
    except ImportError as error:
        raise ImportError("metrics need the extra vlv[eval] (pip install '.[eval]' in its source folder)") from error
    return torchmetrics


def image_metrics(picture: torch.Tensor, original: torch.Tensor) -> dict[str, float]:
    """PSNR in dB and SSIM of one picture against its original.

    Args:
        picture, original: `(3, H, W)` float in 0..1.

    Raises:
        ValueError: If the shapes differ.
    """
    if picture.shape != original.shape or picture.ndim != 3:
        raise ValueError(f"expected two (3, H, W) pictures, got {tuple(picture.shape)} and {tuple(original.shape)}")
    functional = _torchmetrics().functional.image
    pair = picture[None].float(), original[None].float()
    psnr = functional.peak_signal_noise_ratio(*pair, data_range=1.0)
    ssim = functional.structural_similarity_index_measure(*pair, data_range=1.0)
    return {"psnr": round(psnr.item(), 4), "ssim": round(ssim.item(), 4)}


@dataclass
class SetMetrics:
    """FID and KID of two sets; None where a set is too small to compute it, with a word on what it is worth."""

    features: str
    pictures: int
    fid: float | None
    kid: float | None
    note: str


class SetMeter:
    """Gathers two sets batch by batch and gives FID and KID between them; only features are kept.

    Args:
        features: Maps uint8 pictures to `(N, width)` features on the CPU. Without it Inception, whose weights
            torch-fidelity must have at hand.
        features_name: Named in the result, since figures of different features cannot be compared.

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
        with warnings.catch_warnings():  # that it keeps all features: such sets are small beside the images themselves
            warnings.filterwarnings("ignore", message="Metric .* will save all extracted features")
            self.kid = KernelInceptionDistance(feature=feature, subset_size=2, subsets=10)
        self.count = 0

    def update(self, pictures: torch.Tensor, originals: torch.Tensor) -> None:
        """Adds pictures and their originals, both `(N, 3, H, W)` uint8; raises `ValueError` for anything else."""
        for name, images in (("pictures", pictures), ("originals", originals)):
            if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
                raise ValueError(f"{name} must be (N, 3, H, W) uint8, got {tuple(images.shape)} {images.dtype}")
        if len(pictures) != len(originals):
            raise ValueError(f"{len(pictures)} pictures for {len(originals)} originals")
        for metric in (self.fid, self.kid):
            metric.update(originals, real=True)
            metric.update(pictures, real=False)
        self.count += len(pictures)

    def compute(self) -> SetMetrics:
        """The figures, with a word on what they are worth."""
        if self.count < 2:
            return SetMetrics(self.features, self.count, None, None, "FID and KID are of sets: at least 2 pictures")
        self.kid.subset_size = min(self.count, 1000)
        with torch.random.fork_rng():  # KID draws its subsets
            torch.manual_seed(0)
            kid = self.kid.compute()[0].item()
        fid = self.fid.compute().item()
        if self.count < FID_MEANINGFUL:
            note = f"{self.count} pictures are too few for FID and KID to mean anything; use at least {FID_MEANINGFUL}"
        else:
            note = "comparable only with figures of the same features and the same number of pictures"
        return SetMetrics(self.features, self.count, round(fid, 4), round(kid, 6), note)


class EncoderFeatures(nn.Module):
    """The mean image token of a VLV's own vision tower, as features for FID and KID where Inception is not at hand."""

    def __init__(self, encoder: Any, image_processor: Any):
        super().__init__()
        self.encoder, self.image_processor = encoder, image_processor
        self.num_features = encoder.config.image_encoder_config.vision_config.projection_dim

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = self.image_processor(list(images.cpu()), return_tensors="pt").pixel_values
        return self.encoder.get_image_features(pixels.to(self.encoder.device))[:, 0].float().cpu()  # (N, width)


def inception_is_at_hand() -> bool:
    """Whether torch-fidelity and its Inception weights are here, so that nothing would be fetched."""
    from pathlib import Path

    try:
        import torch_fidelity  # noqa: F401
    except ImportError:
        return False
    return any((Path(torch.hub.get_dir()) / "checkpoints").glob("weights-inception-2015-12-05-*.pth"))
