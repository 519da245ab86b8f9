"""The cache of moments: the losses of a run without it, stale ones refused, building resumed."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vlv.diffusion_decoder import StableDiffusionDecoder
from vlv.train import Stage1Config, load_images, stage1
from vlv.train.data import feature_cache
from vlv.train.data.feature_cache import FeatureCache

from .data_files import write_tar


@pytest.fixture(scope="module")
def settings(stage1_checkpoint, stable_diffusion, image_folder):
    return {
        "model": stage1_checkpoint,
        "diffusion_model": stable_diffusion,
        "images": image_folder,
        "max_steps": 3,
        "save_steps": 10,
        "logging_steps": 1,
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-3,
        "validation_steps": 3,
        "num_validation_images": 1,
        "dataloader_num_workers": 0,
        "use_cpu": True,
        "disable_tqdm": True,
    }


def train(settings, **changes):
    trainer = stage1.main([f"--{name}={value}" for name, value in (settings | changes).items()])
    return trainer, [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.fixture(scope="module")
def cached(settings, tmp_path_factory):
    """A trainer that has built a cache, its losses, and the folder of the cache."""
    folder = tmp_path_factory.mktemp("cached")
    return *train(settings, output_dir=folder / "run", cache_moments=folder / "moments"), folder / "moments"


@pytest.mark.slow
def test_losses_are_those_without_the_cache(cached, settings, tmp_path):
    """The same noise is drawn, for latents and for the denoiser."""
    _, plain = train(settings, output_dir=tmp_path / "plain")
    trainer, again = train(settings, output_dir=tmp_path / "again", cache_moments=cached[2], dataloader_num_workers=1)
    assert len(set(plain)) == 3
    assert cached[1] == pytest.approx(plain, rel=1e-5) and again == pytest.approx(plain, rel=1e-5)
    assert trainer.diffusion_decoder.vae.encoder is None
    assert (tmp_path / "again" / "samples" / "step-0000003.png").is_file()


@pytest.mark.slow
def test_a_cache_that_is_complete_is_not_touched_and_the_encoder_does_not_run(cached, settings, tmp_path, monkeypatch):
    def encode(*_):
        raise AssertionError("the autoencoder's encoder runs")

    monkeypatch.setattr(StableDiffusionDecoder, "encode_moments", encode)
    before = {path: path.stat().st_mtime_ns for path in cached[2].iterdir()}
    train(settings, output_dir=tmp_path, cache_moments=cached[2], max_steps=1)
    assert {path: path.stat().st_mtime_ns for path in cached[2].iterdir()} == before


@pytest.mark.parametrize("change", ["autoencoder", "size"])
def test_a_stale_cache_is_refused_with_what_differs(change, cached, settings, stable_diffusion, tmp_path):
    changes = {"diffusion_image_size": 64}
    if change == "autoencoder":
        other = shutil.copytree(stable_diffusion, tmp_path / "other")
        file = other / "vae" / "diffusion_pytorch_model.safetensors"
        weights = load_file(file)
        weights["encoder.conv_in.bias"] = weights["encoder.conv_in.bias"] + 1
        save_file(weights, file)
        changes = {"diffusion_model": other}
    with pytest.raises(SystemExit) as ended:
        train(settings, output_dir=tmp_path / "run", cache_moments=cached[2], **changes)
    message = str(ended.value)
    row = "autoencoder: " if change == "autoencoder" else "diffusion_image_size: 32 -> 64"
    assert f"  {row}" in message and "remove this one" in message


@pytest.mark.parametrize("name", ["random_crop", "horizontal_flip", "streaming"])
def test_changing_images_and_a_cache_are_refused_together(name, tmp_path):
    with pytest.raises(ValueError, match=f"cache_moments does not work with {name}"):
        Stage1Config(output_dir=str(tmp_path), cache_moments=str(tmp_path), **{name: True})


def mean_colours(images: list[Image.Image]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.asarray(image).mean((0, 1))) for image in images])


@pytest.fixture
def build(image_processor, monkeypatch):
    """Fills a cache with the mean colour of each image; returns it and the number of images that were computed."""
    monkeypatch.setattr(feature_cache, "ROWS_PER_FILE", 6)

    def run(folder, images, fail_after=None, **options):
        computed: list[int] = []

        def compute(colours: torch.Tensor) -> torch.Tensor:
            if fail_after is not None and sum(computed) >= fail_after:
                raise KeyboardInterrupt
            computed.append(len(colours))
            return colours

        cache = FeatureCache(folder, {"model": "colours"}, (3,), torch.float64)
        dataset = load_images(str(images))
        cache.build(dataset, image_processor, mean_colours, compute, batch_size=4, **options)
        return cache, sum(computed)

    return run


@pytest.fixture
def different_images(tmp_path) -> list[Image.Image]:
    (tmp_path / "data").mkdir()
    images = [Image.new("RGB", (4, 4), (number, 0, 0)) for number in range(16)]
    for number, image in enumerate(images):
        image.save(tmp_path / "data" / f"{number:02}.png")
    return images


def test_an_interrupted_building_goes_on_with_the_next_file(build, different_images, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cache", tmp_path / "data", fail_after=8)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1
    cache, computed = build(tmp_path / "cache", tmp_path / "data")
    assert computed == 10 and len(cache) == 16
    assert [cache.get(image, "image")[0].item() for image in different_images] == [*range(16)]


def test_what_a_killed_process_leaves_is_not_read(build, different_images, tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / ".cache.json.0a1b").write_text("{")
    build(folder, tmp_path / "data")
    path = sorted(folder.glob("*.safetensors"))[0]
    path.with_name(f".{path.name}.0a1b.safetensors").write_bytes(path.read_bytes()[:100])
    path.unlink()
    cache, computed = build(folder, tmp_path / "data")
    assert computed == 6 and len(cache) == 16


def test_images_whose_shard_cannot_be_opened_are_left_out(build, tmp_path):
    for number in range(2):
        write_tar(tmp_path / "data" / f"{number}.tar", range(2 * number, 2 * number + 2))

    def lose_shard(*arguments) -> None:
        shard = tmp_path / "data" / "1.tar"
        shard.unlink()
        shard.mkdir()

    cache, computed = build(tmp_path / "cache", tmp_path / "data", say=lose_shard)
    assert computed == 2 and len(cache) == 2


def test_processes_share_the_work(build, different_images, tmp_path):
    first, computed = build(tmp_path / "cache", tmp_path / "data", rank=0, num_ranks=2)
    assert computed == 10 and len(first) == 10
    cache, computed = build(tmp_path / "cache", tmp_path / "data", rank=1, num_ranks=2)
    assert computed == 6 and len(cache) == 16


def test_images_that_are_added_are_computed_and_one_that_changes_is_named(build, different_images, tmp_path):
    build(tmp_path / "cache", tmp_path / "data")
    new = Image.new("RGB", (4, 4), "white")
    new.save(tmp_path / "data" / "new.png")
    (tmp_path / "data" / "broken.png").write_bytes(b"no image")
    cache, computed = build(tmp_path / "cache", tmp_path / "data")
    assert computed == 1 and cache.get(new, "image").tolist() == [255, 255, 255]
    with pytest.raises(ValueError, match=r"a/b\.png is not in the cache"):
        cache.get(Image.new("RGB", (4, 4), "blue"), "a/b.png")


def test_the_size_is_said_and_a_disk_that_is_too_small_refused(build, different_images, tmp_path, monkeypatch, capsys):
    build(tmp_path / "small", tmp_path / "data")
    assert "16 images of 16" in capsys.readouterr().out
    monkeypatch.setattr(FeatureCache, "bytes_of", lambda self, count: 10**18)
    with pytest.raises(OSError, match="free; name another disk"):
        build(tmp_path / "large", tmp_path / "data")
    assert not (tmp_path / "large").exists()


def test_another_folder_and_a_damaged_file_are_refused(build, different_images, tmp_path):
    with pytest.raises(ValueError, match=r"holds no cache\.json"):
        build(tmp_path / "data", tmp_path / "data")
    build(tmp_path / "cache", tmp_path / "data")
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["made_of"]["model"] == "colours"
    file = next((tmp_path / "cache").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is damaged"):
        build(tmp_path / "cache", tmp_path / "data")
