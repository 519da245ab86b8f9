"""`make miniature`: every part trains on what the parts before it left, and what comes out is a model."""

import json

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from vlv import hub
from vlv.miniature import recipe
from vlv.miniature.autoencoder import train_autoencoder
from vlv.miniature.captioner import train_captioner
from vlv.miniature.data import SceneDataset
from vlv.miniature.encoder import train_encoder
from vlv.miniature.evaluation import SCENE_CLASSIFIER_FILE
from vlv.miniature.language_model import train_language_model
from vlv.miniature.scene_classifier import train_scene_classifier
from vlv.miniature.teacher import train_teacher
from vlv.miniature.training import MovingAverageCallback, train_module
from vlv.pipelines import VLVCaptioningPipeline, load_reconstruction


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder where every part was trained for two steps, in order, by the functions that the recipe calls."""
    root = tmp_path_factory.mktemp("miniature")
    classifier = root / SCENE_CLASSIFIER_FILE
    work = root / "work"
    train_scene_classifier(classifier, work / "scene classifier", images=128)
    train_autoencoder(root / "autoencoder", work / "autoencoder", images=32)
    train_teacher(root / "teacher", work / "teacher", root / "autoencoder", classifier, images=32, batch_size=16)
    train_teacher(
        root / "teacher-3",
        work / "teacher-3",
        root / "autoencoder",
        classifier,
        images=32,
        batch_size=16,
        partial_captions=0.5,
        embedding_mixing=0.5,
        initial_teacher=root / "teacher",
    )
    train_encoder(root / "encoder", work / "encoder", root / "teacher-3", classifier, images=32, batch_size=16)
    train_language_model(root / "language-model", work / "language-model", captions=32, batch_size=16)
    train_captioner(
        root / "captioner",
        work / "captioner",
        root / "encoder",
        root / "language-model",
        pairs=32,
        epochs=1,
        batch_size=16,
    )
    return root


@pytest.mark.slow
def test_the_parts_that_were_trained_make_a_model(trained, tmp_path, pictures):
    recipe.assemble(trained, tmp_path / "assembled")
    model, processor = hub.load_captioner(tmp_path / "assembled")
    caption = VLVCaptioningPipeline(model=model, processor=processor)(pictures[0], max_new_tokens=4)
    assert isinstance(caption[0]["generated_text"], str)
    pipe = load_reconstruction(tmp_path / "assembled")
    assert pipe(pictures[0], num_inference_steps=2).images[0].size == (64, 64)
    assert (tmp_path / "assembled" / SCENE_CLASSIFIER_FILE).is_file()


@pytest.mark.slow
def test_a_teacher_goes_on_from_the_teacher_that_it_is_given(trained):
    weights = [
        torch.cat([p.flatten() for p in hub_part(trained / name).parameters()]) for name in ("teacher", "teacher-3")
    ]
    assert 0 < (weights[0] - weights[1]).abs().mean() < 1e-2  # two steps away, not another start


def hub_part(folder):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet")


@pytest.mark.slow
def test_what_is_trained_is_skipped(trained):
    done = [name for name, part in recipe.PARTS.items() if (trained / part.done).exists()]
    assert done == [name for name in recipe.PARTS if name != "teacher-2"]  # which was not trained here
    plan = recipe.plan(trained, with_tables=False)
    assert "encoder                    done" in plan
    assert f"in all                     about 0 h {recipe.PARTS['teacher-2'].minutes} min" in plan


def test_the_plan_alone_starts_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["vlv.miniature", "--root", str(tmp_path / "runs"), "--plan"])
    recipe.main()
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in [*recipe.PARTS, *recipe.VARIANTS, "tables", "in all"])
    assert not (tmp_path / "runs").exists()


class Brightness(nn.Module):
    """Predicts the brightness of an image: a part that trains in no time."""

    def __init__(self):
        super().__init__()
        self.read = nn.Linear(3 * 8 * 8, 1)

    def forward(self, pixels):
        small = nn.functional.interpolate(pixels.float() / 255, 8).flatten(1)
        return {"loss": (self.read(small).squeeze(1) - small.mean(dim=1)).pow(2).mean()}


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def train_brightness(folder, *callbacks):
    torch.manual_seed(0)
    module = Brightness()
    averaging = MovingAverageCallback(module, decay=0.9)
    settings = {"batch_size": 4, "learning_rate": 1e-3, "save_steps": 3, "logging_steps": 1, "warmup_steps": 2}
    train_module(module, SceneDataset(32), folder, callbacks=(averaging, *callbacks), **settings)
    return module.state_dict(), averaging.average.state_dict()


def test_a_part_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path):
    unbroken = train_brightness(tmp_path / "unbroken")
    train_brightness(tmp_path / "stopped", StopAt(5))  # two steps after its last checkpoint
    resumed = train_brightness(tmp_path / "stopped")
    for ours, theirs in zip(resumed, unbroken, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    state = json.loads((tmp_path / "stopped" / "checkpoint-8" / "trainer_state.json").read_text())
    assert [line["step"] for line in state["log_history"] if "loss" in line] == list(range(1, 9))
