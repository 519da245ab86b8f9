"""Statistics of features: batches and processes add up, files are reused, and refused where they are stale."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import multiprocessing

from vlv.evaluation.statistics import FeatureStatistics, gather_statistics, process_shard

FEATURES = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 1e4  # far from 0 beside their spread


def test_batches_have_the_mean_and_covariance_of_all_features():
    statistics = FeatureStatistics()
    for batch in FEATURES.split([1, 20, 29]):
        statistics.update(batch)
    exact = FEATURES.double()
    assert statistics.count == 50
    assert torch.allclose(statistics.mean, exact.mean(0), rtol=1e-14)
    assert torch.allclose(statistics.covariance, torch.cov(exact.T), rtol=1e-9)
    assert torch.equal(statistics.features, FEATURES)


def test_the_statistics_of_two_sets_add_up_to_those_of_both():
    total = FeatureStatistics.of(FEATURES[:20]) + FeatureStatistics.of(FEATURES[20:])
    assert torch.allclose(total.covariance, torch.cov(FEATURES.double().T), rtol=1e-9)
    assert torch.equal((FeatureStatistics() + total).features, FEATURES)


def test_features_that_are_not_finite_or_of_another_width_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        FeatureStatistics.of(torch.full((2, 3), torch.nan))
    with pytest.raises(ValueError, match="width 6 and 5 cannot be added"):
        FeatureStatistics.of(FEATURES).update(FEATURES[:, :5])


def test_saved_statistics_are_read_again(tmp_path):
    statistics = FeatureStatistics.of(FEATURES)
    statistics.save(tmp_path / "s.safetensors", "images", "extractor")
    read = FeatureStatistics.load(tmp_path / "s.safetensors", extractor="extractor", fingerprint="images")
    assert read.count == 50
    assert torch.equal(read.features, FEATURES)
    assert torch.equal(read.covariance, statistics.covariance)


@pytest.mark.parametrize("changed", ["images", "extractor"])
def test_statistics_of_other_images_or_another_extractor_are_refused(tmp_path, changed):
    FeatureStatistics.of(FEATURES).save(tmp_path / "s.safetensors", "images", "extractor")
    expected = {"fingerprint": "images", "extractor": "extractor"}
    expected["fingerprint" if changed == "images" else "extractor"] = "another"
    with pytest.raises(ValueError, match=f"s.safetensors is stale: its {changed} had the fingerprint"):
        FeatureStatistics.load(tmp_path / "s.safetensors", **expected)


def test_statistics_of_pytorch_fid_are_read(tmp_path):
    mean, covariance = FEATURES.double().mean(0).numpy(), torch.cov(FEATURES.double().T).numpy()
    np.savez(tmp_path / "s.npz", mu=mean, sigma=covariance)
    read = FeatureStatistics.load(tmp_path / "s.npz", extractor="any")
    assert np.array_equal(read.mean, mean) and np.array_equal(read.covariance, covariance)
    with pytest.raises(ValueError, match="hold no features"):
        _ = read.features


def test_files_without_statistics_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there are no statistics at .*none\.safetensors"):
        FeatureStatistics.load(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("no")
    with pytest.raises(ValueError, match=r"text\.safetensors cannot be read as statistics"):
        FeatureStatistics.load(tmp_path / "text.safetensors")
    np.savez(tmp_path / "other.npz", mean=np.zeros(3))
    with pytest.raises(ValueError, match=r"other\.npz must hold the arrays mu and sigma"):
        FeatureStatistics.load(tmp_path / "other.npz")


def gather(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    total = gather_statistics(FeatureStatistics.of(process_shard(FEATURES)))
    total.save(Path(folder) / f"{rank}.safetensors", "images", "extractor")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_gather_the_statistics_of_all_images_in_their_order(tmp_path):
    multiprocessing.start_processes(gather, (str(tmp_path),), nprocs=2, start_method="fork")
    for rank in range(2):
        total = FeatureStatistics.load(tmp_path / f"{rank}.safetensors")
        assert torch.equal(total.features, FEATURES)
        assert torch.allclose(total.covariance, torch.cov(FEATURES.double().T), rtol=1e-9)
