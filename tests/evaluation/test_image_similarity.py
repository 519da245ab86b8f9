"""Metrics of images and sets of images: known values, and a note if a set is too small."""

import pytest
import torch
from PIL import Image
from torch import nn

from vlv.evaluation import EncoderFeatures, SetMeter, image_metrics
from vlv.evaluation.image_sets import compare_pairs


class Means(nn.Module):
    """Six features of an image: the mean of each colour in its upper and lower half."""

    name, fingerprint = "Means", ""

    def forward(self, images: list[torch.Tensor]) -> torch.Tensor:
        upper, lower = torch.stack(images).float().div(255).chunk(2, dim=2)
        return torch.cat([upper.mean((2, 3)), lower.mean((2, 3))], dim=1)


def noise(n: int, seed: int, shift: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 200, (n, 3, 16, 16), generator=generator) + shift).to(torch.uint8)


@pytest.mark.slow
def test_psnr_and_ssim_of_known_images():
    grey = torch.full((3, 32, 32), 0.5)
    assert image_metrics(grey + 0.1, grey)["psnr"] == pytest.approx(20.0, abs=1e-3)  # 10 log10(1 / 0.01)
    image = torch.rand(3, 32, 32)
    assert image_metrics(image, image)["ssim"] == pytest.approx(1.0)
    assert image_metrics(torch.rand(3, 32, 32), image)["ssim"] < 0.3
    with pytest.raises(ValueError, match=r"two \(3, H, W\) images"):
        image_metrics(grey, grey[:, :16])


def test_images_that_are_too_small_for_ssim_are_named_and_have_a_psnr(tmp_path):
    paths = [tmp_path / f"{grey}.png" for grey in (100, 101)]
    for path in paths:
        Image.new("RGB", (8, 5), (int(path.stem),) * 3).save(path)
    with pytest.raises(ValueError, match=r"101\.png: SSIM needs images of at least 6 x 6 pixels, got 8 x 5"):
        compare_pairs([tuple(paths)], ["psnr", "ssim"])
    assert compare_pairs([tuple(paths)], ["psnr"]) == {"psnr": [pytest.approx(48.1308, abs=1e-3)]}


def test_fid_and_kid_are_smaller_for_similar_sets_than_for_different_ones():
    similar, different = SetMeter(Means()), SetMeter(Means())
    for start in range(0, 64, 16):  # in batches
        similar.update(noise(16, seed=start), noise(16, seed=start + 1))
        different.update(noise(16, seed=start), noise(16, seed=start + 1, shift=50))
    near, far = similar.compute(), different.compute()
    assert near.num_images == 64 and near.features == "Means"
    assert near.fid < far.fid / 20
    assert far.fid == pytest.approx(6 * (50 / 255) ** 2, rel=0.05)  # means differ by 50, spreads are equal
    assert near.kid < far.kid
    assert "64 images are not meaningful" in near.note


def test_one_image_has_no_fid_and_kid():
    meter = SetMeter(Means())
    meter.update(noise(1, 0), noise(1, 1))
    result = meter.compute()
    assert result.fid is None and result.kid is None and "at least 2" in result.note


def test_computing_keeps_the_random_state():
    meter = SetMeter(Means())
    meter.update(noise(4, 0), noise(4, 1))
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    meter.compute()
    assert torch.equal(torch.rand(1), expected)


def test_features_of_an_encoder_are_named_in_the_result(encoder, image_processor):
    features = EncoderFeatures(encoder, image_processor)
    assert features(list(noise(3, 0))).shape == (3, features.num_features)
    meter = SetMeter(features, "mean image token")
    meter.update(noise(3, 0), noise(3, 1))
    assert meter.compute().features == "mean image token"


def test_images_of_another_shape_dtype_or_number_are_refused():
    with pytest.raises(ValueError, match=r"images must be \(N, 3, H, W\) uint8"):
        SetMeter(Means()).update(torch.rand(2, 3, 8, 8), noise(2, 0))
    with pytest.raises(ValueError, match="got 2 images and 3 originals"):
        SetMeter(Means()).update(noise(2, 0), noise(3, 0))
