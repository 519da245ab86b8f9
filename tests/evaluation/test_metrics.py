"""Metrics by torchmetrics: known values, and a clear word where a set is too small to mean anything."""

import pytest
import torch
from torch import nn

from vlv.evaluation import EncoderFeatures, SetMeter, image_metrics


class Means(nn.Module):
    """Six features of a picture: the mean of each colour in its upper and lower half."""

    num_features = 6

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        upper, lower = images.float().div(255).chunk(2, dim=2)
        return torch.cat([upper.mean((2, 3)), lower.mean((2, 3))], dim=1)


def noise(n: int, seed: int, shift: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 200, (n, 3, 16, 16), generator=generator) + shift).to(torch.uint8)


def test_psnr_and_ssim_of_known_pictures():
    grey = torch.full((3, 32, 32), 0.5)
    assert image_metrics(grey + 0.1, grey)["psnr"] == pytest.approx(20.0, abs=1e-3)  # 10 log10(1 / 0.01)
    picture = torch.rand(3, 32, 32)
    assert image_metrics(picture, picture)["ssim"] == pytest.approx(1.0)
    assert image_metrics(torch.rand(3, 32, 32), picture)["ssim"] < 0.3
    with pytest.raises(ValueError, match=r"two \(3, H, W\) pictures"):
        image_metrics(grey, grey[:, :16])


def test_fid_tells_like_sets_from_unlike_ones():
    alike, unlike = SetMeter(Means()), SetMeter(Means())
    for start in range(0, 64, 16):  # in batches, as pictures come
        alike.update(noise(16, seed=start), noise(16, seed=start + 1))
        unlike.update(noise(16, seed=start), noise(16, seed=start + 1, shift=50))
    near, far = alike.compute(), unlike.compute()
    assert near.pictures == 64 and near.features == "Means"
    assert near.fid < far.fid / 20
    assert far.fid == pytest.approx(6 * (50 / 255) ** 2, rel=0.05)  # means differ by 50, spreads are equal
    assert near.kid < far.kid
    assert "64 pictures are too few" in near.note


def test_one_picture_is_no_set():
    meter = SetMeter(Means())
    meter.update(noise(1, 0), noise(1, 1))
    result = meter.compute()
    assert result.fid is None and result.kid is None and "at least 2" in result.note


def test_measuring_leaves_the_random_state_alone():
    meter = SetMeter(Means())
    meter.update(noise(4, 0), noise(4, 1))
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    meter.compute()
    assert torch.equal(torch.rand(1), expected)


def test_an_encoders_own_features(encoder, image_processor):
    features = EncoderFeatures(encoder, image_processor)
    assert features(noise(3, 0)).shape == (3, features.num_features)
    meter = SetMeter(features, "mean image token")
    meter.update(noise(3, 0), noise(3, 1))
    assert meter.compute().features == "mean image token"


def test_wrong_pictures_are_refused():
    with pytest.raises(ValueError, match=r"pictures must be \(N, 3, H, W\) uint8"):
        SetMeter(Means()).update(torch.rand(2, 3, 8, 8), noise(2, 0))
    with pytest.raises(ValueError, match="2 pictures for 3 originals"):
        SetMeter(Means()).update(noise(2, 0), noise(3, 0))
