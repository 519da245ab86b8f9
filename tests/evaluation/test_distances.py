"""Distances of sets of features: equal to the code of pytorch-fid and clean-fid, and to closed forms."""

import numpy as np
import pytest
import torch

from vlv.evaluation.distances import (
    distance_interval,
    frechet_distance,
    gaussian_mmd,
    kernel_distance,
    mean_interval,
    rank_note,
)
from vlv.evaluation.statistics import FeatureStatistics


def features_of_two_sets() -> tuple[torch.Tensor, torch.Tensor]:
    """400 and 300 correlated features of width 16, the same on every machine."""
    random = np.random.RandomState(7)
    mix = random.randn(16, 16)
    first = random.randn(400, 16) @ mix
    return torch.tensor(first), torch.tensor(random.randn(300, 16) @ mix * 1.3 + 0.5 * random.rand(16))


def gaussian(mean: torch.Tensor, covariance: torch.Tensor) -> FeatureStatistics:
    return FeatureStatistics(101, mean, covariance * 100)


def test_the_frechet_distance_is_that_of_pytorch_fid_and_clean_fid():
    first, second = map(FeatureStatistics.of, features_of_two_sets())
    # calculate_frechet_distance of pytorch-fid 0.3.0, and frechet_distance of clean-fid 0.1.35, with scipy 1.17.1
    assert frechet_distance(first, second) == pytest.approx(25.865552601268064, abs=1e-6)


def test_the_kernel_distance_is_that_of_clean_fid():
    first, second = features_of_two_sets()
    # kernel_distance of clean-fid 0.1.35, of 300 images each
    assert kernel_distance(second, first[:300]) == pytest.approx(25.094298352709327, abs=1e-6)


def test_the_kernel_distance_of_large_sets_is_a_mean_over_subsets_and_repeatable():
    first, second = features_of_two_sets()
    whole = kernel_distance(first[:300], second)
    parts = kernel_distance(first[:300], second, subset_size=150)
    assert parts == kernel_distance(first[:300], second, subset_size=150)
    assert parts != whole and parts == pytest.approx(whole, rel=0.2)


def test_the_frechet_distance_of_gaussians_with_commuting_covariances_has_a_closed_form():
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    mean = torch.arange(5, dtype=torch.float64)
    spreads = [torch.tensor(s, dtype=torch.float64) for s in ([1, 2, 3, 4, 5], [2, 2, 0.5, 4, 1])]
    first, second = (rotation @ torch.diag(s**2) @ rotation.T for s in spreads)
    expected = mean.square().sum() + (spreads[0] - spreads[1]).square().sum()
    assert frechet_distance(gaussian(mean, first), gaussian(0 * mean, second)) == pytest.approx(
        expected.item(), abs=1e-9
    )


def test_the_frechet_distance_of_fewer_images_than_dimensions_is_exact_and_has_a_note():
    first, second = (features[:10] for features in features_of_two_sets())
    sets = [FeatureStatistics.of(features) for features in (first, second)]
    centred = [(features - features.mean(0)) / 3 for features in (first, second)]  # 3² = 10 - 1
    cross = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()  # the trace of the root, from the images themselves
    traces = sum(c.square().sum() for c in centred)
    expected = (first.mean(0) - second.mean(0)).square().sum() + traces - 2 * cross
    assert frechet_distance(*sets) == pytest.approx(expected.item(), rel=1e-7)
    assert "10 images for features of width 16" in rank_note(sets[0], "generated")
    assert rank_note(FeatureStatistics.of(features_of_two_sets()[0]), "generated") is None


def test_the_gaussian_mmd_of_two_perpendicular_features_has_a_closed_form():
    first, second = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 0.5]])  # of any length
    assert gaussian_mmd(first, second) == pytest.approx(1000 * (2 - 2 * np.exp(-2 / 200)), abs=1e-9)
    assert gaussian_mmd(first, first) == 0


def test_features_of_different_widths_are_refused():
    first, second = torch.rand(4, 3), torch.rand(4, 2)
    for distance in (kernel_distance, gaussian_mmd):
        with pytest.raises(ValueError, match="width 3 and 2 cannot be compared"):
            distance(first, second)
    with pytest.raises(ValueError, match="width 3 and 2 cannot be compared"):
        frechet_distance(FeatureStatistics.of(first), FeatureStatistics.of(second))


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    low, high = mean_interval(values)
    error = 1.96 * values.std().item() / 20
    assert [low, high] == pytest.approx([values.mean().item() - error, values.mean().item() + error], abs=0.02)
    assert high - low > error


def test_the_interval_of_a_distance_contains_it_and_ends_at_the_least_value():
    first, second = features_of_two_sets()

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return (a.mean(0) - b.mean(0)).square().sum().item()

    value = distance(first, second)
    low, high = distance_interval(distance, first, second, value, samples=50)
    assert low < value < high and value - low == pytest.approx(high - value)
    fewer = distance_interval(distance, first, second, value, samples=50, max_images=100)
    assert fewer[1] - fewer[0] == pytest.approx(high - low, rel=0.5)  # scaled to the standard error of all images
    assert distance_interval(distance, first, first, 0.0, samples=5, minimum=0.0)[0] == 0.0
    shifted = first + 1  # of the same inputs: the difference of the means does not vary
    low, high = distance_interval(distance, first, shifted, 16.0, samples=20, paired=True)
    assert [low, high] == pytest.approx([16, 16]) and distance_interval(distance, first, shifted, 16.0, 20)[1] > 17
