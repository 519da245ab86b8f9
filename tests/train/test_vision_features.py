"""The cache of vision features: the losses of a run without it, the vision tower at rest, stale ones refused."""

import shutil
from functools import partial

import pytest
import torch
from transformers.models.florence2.modeling_florence2 import Florence2VisionBackbone

from vlv import VLVImageProcessor
from vlv.train import Stage1Config, freeze_for_stage1, load_images, stage1, stage2
from vlv.train.caches import open_vision_features

from ..builders import assert_close_to_scale

STAGES = {"stage1": stage1, "stage2": stage2}
TOKENS, WIDTH = 1 + 8 * 8, 24  # of 64 x 64 pixels


@pytest.fixture(scope="module")
def settings(stage1_checkpoint, stable_diffusion, language_model, image_folder):
    common = {
        "model": stage1_checkpoint,
        "max_steps": 2,
        "save_steps": 10,
        "logging_steps": 1,
        "eval_steps": 2,
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-3,
        "validation_steps": 0,
        "dataloader_num_workers": 0,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    own = {"diffusion_model": stable_diffusion, "images": image_folder, "eval_images": image_folder / "a"}
    pairs = {"language_model": language_model, "pairs": image_folder, "eval_pairs": image_folder / "b"}
    return {"stage1": common | own, "stage2": common | pairs}


def train(stage, settings, **changes):
    arguments = [f"--{name}={value}" for name, value in (settings[stage] | changes).items()]
    trainer = STAGES[stage].main(arguments)
    return [row[name] for row in trainer.state.log_history for name in ("loss", "eval_loss") if name in row]


@pytest.fixture
def calls(monkeypatch):
    """The number of images of each call of a vision tower."""
    counted: list[int] = []
    forward = Florence2VisionBackbone.forward

    def count(self, pixels, **kwargs):
        counted.append(len(pixels))
        return forward(self, pixels, **kwargs)

    monkeypatch.setattr(Florence2VisionBackbone, "forward", count)
    return counted


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_those_without_the_cache_and_the_vision_tower_rests(stage, settings, calls, tmp_path, capsys):
    plain = train(stage, settings, output_dir=tmp_path / "plain")
    assert len(set(plain)) == 3 and len(calls) > 2
    calls.clear()
    cache = {"cache_vision_features": tmp_path / "features"}
    if stage == "stage1":
        cache["cache_moments"] = tmp_path / "moments"
    cached = train(stage, settings, output_dir=tmp_path / "cached", **cache)
    assert sum(calls) == 16  # each image once, before the training
    assert "6.26 kB an image, up to 100 kB in all" in capsys.readouterr().out  # of 65 x 24 float32
    assert cached == pytest.approx(plain, rel=1e-6)


class Arguments:
    """The settings that a cache is opened with."""

    bf16 = fp16 = False
    unfreeze, trainable, TRAINABLE = None, "transformer", Stage1Config.TRAINABLE
    device, train_batch_size, dataloader_num_workers, process_index, world_size = torch.device("cpu"), 4, 0, 0, 1

    def __init__(self, folder, **changes):
        self.cache_vision_features = folder
        vars(self).update(changes)


@pytest.fixture
def open_cache(encoder, image_folder, image_processor, tmp_path):
    freeze_for_stage1(encoder, "transformer")
    data = [load_images(str(image_folder))]

    def run(processor=image_processor, model=encoder, **changes):
        return open_vision_features(Arguments(tmp_path / "features", **changes), data, processor, model)

    return run


def test_features_are_the_last_tensor_that_is_frozen(open_cache, encoder, images, image_processor, tmp_path):
    cache = open_cache()
    assert cache.shape == (TOKENS, WIDTH) and cache.dtype == torch.float32
    pixels = image_processor(images[:1], return_tensors="pt").pixel_values
    found = encoder.get_image_features(pixels)
    load = partial(image_processor.load, images[0])
    assert_close_to_scale(cache.get(load(), "image"), found.pooler_output[0])
    shutil.rmtree(tmp_path / "features")
    encoder.image_encoder.multi_modal_projector.requires_grad_(True)
    unprojected = open_cache().get(load(), "image")
    assert_close_to_scale(unprojected, found.last_hidden_state[0])
    assert_close_to_scale(encoder(image_features=unprojected[None]).conditioning, encoder(pixels).conditioning)


def test_features_have_the_precision_of_the_training(open_cache, images, image_processor):
    cache = open_cache(bf16=True)
    assert cache.get(image_processor.load(images[0]), "image").dtype == torch.bfloat16


def test_a_stale_cache_is_refused_with_what_differs(open_cache, encoder):
    open_cache()
    with pytest.raises(ValueError, match="  image_mean: "):
        open_cache(VLVImageProcessor(size={"height": 64, "width": 64}, image_mean=[0.5, 0.5, 0.5]))
    with pytest.raises(ValueError, match=r"  size: .*48.*\n.*shape"):
        open_cache(VLVImageProcessor(size={"height": 48, "width": 48}))
    with pytest.raises(ValueError, match="  dtype: float32 -> bfloat16"):
        open_cache(bf16=True)
    with torch.no_grad():
        encoder.image_encoder.vision_tower.convs[0].conv.bias.add_(1)
    with pytest.raises(ValueError, match=r"  vision_tower: [0-9a-f]{64} -> [0-9a-f]{64}\n"):
        open_cache()


@pytest.mark.parametrize(
    ("stage", "changes", "words"),
    [
        ("stage1", {"trainable": "all"}, "trainable 'all', which trains"),
        ("stage1", {"trainable": "all", "encoder_lora_rank": 2}, "'all' with encoder_lora_rank, which trains"),
        ("stage1", {"unfreeze": "0: projector, 2: all"}, "unfreeze '0: projector, 2: all', which trains"),
        ("stage2", {"trainable": "all+vision"}, "trainable 'all[+]vision', which trains"),
    ],
)
def test_a_vision_tower_that_is_trained_is_refused(stage, changes, words, settings, tmp_path):
    with pytest.raises(SystemExit, match=words):
        train(stage, settings, output_dir=tmp_path / "run", cache_vision_features=tmp_path / "features", **changes)
    assert not (tmp_path / "features").exists()


@pytest.mark.parametrize("half", [False, True])
def test_a_run_in_half_precision_records_whether_features_are_rounded_and_not_where_they_lie(half, tmp_path):
    runs = [Stage1Config(use_cpu=True, bf16=half, cache_vision_features=folder) for folder in (None, "a", "b")]
    counted = [config.result_settings().get("cache_vision_features") for config in runs]
    assert counted == ([False, True, True] if half else [None, None, None])
    assert ["cache_vision_features" in config.other_settings() for config in runs] == [not half] * 3


@pytest.mark.parametrize("name", ["random_crop", "horizontal_flip", "streaming"])
def test_changing_images_and_a_cache_are_refused_together(name, tmp_path):
    with pytest.raises(ValueError, match=f"cache_vision_features does not work with {name}"):
        Stage1Config(output_dir=str(tmp_path), cache_vision_features=str(tmp_path), **{name: True})
