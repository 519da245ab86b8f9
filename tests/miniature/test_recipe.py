"""`make miniature`: each run trains on the outputs of the runs before it, and the result is a model."""

import inspect
import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from vlv import hub
from vlv.miniature import recipe
from vlv.miniature.autoencoder import train_autoencoder
from vlv.miniature.captioner import train_captioner
from vlv.miniature.data import SceneDataset, evaluation_items
from vlv.miniature.encoder import train_encoder
from vlv.miniature.evaluation import SCENE_CLASSIFIER_FILE, measure_captions
from vlv.miniature.instructed_captioner import train_instructed_captioner
from vlv.miniature.instructions import INSTRUCTIONS
from vlv.miniature.language_model import train_language_model
from vlv.miniature.scene_classifier import train_scene_classifier
from vlv.miniature.teacher import train_teacher
from vlv.miniature.training import MovingAverageCallback, train_module
from vlv.pipelines import VLVCaptioningPipeline, load_reconstruction


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder where every part was trained for two steps, in order, by the functions that the recipe calls."""
    root = tmp_path_factory.mktemp("miniature")
    scene_classifier = root / SCENE_CLASSIFIER_FILE
    work = root / "work"
    small = {"images": 8, "batch_size": 4}
    train_scene_classifier(scene_classifier, work / "scene-classifier", images=128, evaluation_images=8)
    train_autoencoder(
        root / "autoencoder", work / "autoencoder", images=2, batch_size=1, evaluation_images=2, scaling_images=2
    )
    train_teacher(root / "teacher", work / "teacher", root / "autoencoder", scene_classifier, **small)
    train_teacher(
        root / "teacher-3",
        work / "teacher-3",
        root / "autoencoder",
        scene_classifier,
        **small,
        partial_captions=0.5,
        embedding_mixing=0.5,
        initial_teacher=root / "teacher",
    )
    train_encoder(root / "encoder", work / "encoder", root / "teacher-3", scene_classifier, **small)
    train_language_model(root / "language-model", work / "language-model", captions=8, batch_size=4)
    train_captioner(
        root / "captioner",
        work / "captioner",
        root / "encoder",
        root / "language-model",
        pairs=8,
        epochs=1,
        batch_size=4,
    )
    instructed = root / "instructed-captioner"
    train_instructed_captioner(instructed, work / instructed.name, root / "captioner", pairs=8, epochs=1, batch_size=4)
    return root


@pytest.mark.slow
def test_the_trained_parts_are_assembled_into_a_model(trained, tmp_path, images):
    recipe.assemble(trained, tmp_path / "assembled")
    model, processor = hub.load_captioner(tmp_path / "assembled")
    caption = VLVCaptioningPipeline(model=model, processor=processor)(images[0], max_new_tokens=4)
    assert isinstance(caption[0]["generated_text"], str)
    pipe = load_reconstruction(tmp_path / "assembled")
    assert pipe(images[0], num_inference_steps=2).images[0].size == (64, 64)
    assert (tmp_path / "assembled" / SCENE_CLASSIFIER_FILE).is_file()


@pytest.mark.slow
def test_the_instructed_captioner_keeps_its_encoder_and_has_more_tokens(trained):
    before, _ = hub.load_captioner(trained / "captioner")
    model, processor = hub.load_captioner(trained / "instructed-captioner")
    assert model.config.instructions == [instruction.text for instruction in INSTRUCTIONS]
    for name, weight in model.model.state_dict().items():
        torch.testing.assert_close(weight, before.model.state_dict()[name], rtol=0, atol=0)
    weights, old = (m.language_model.get_input_embeddings().weight for m in (model, before))
    assert len(weights) == len(processor.tokenizer) > len(old) and not torch.equal(weights[: len(old)], old)
    found: dict = {}
    pixels, scenes = evaluation_items("test", 2)
    measure_captions(model, processor, "test", pixels, scenes, found.__setitem__)
    assert list(found) == ["captions, test", "no instruction, test", *(f'"{i.text}", test' for i in INSTRUCTIONS)]
    assert all(set(found[f'"{i.text}", test']) == {"form", "content_f1", "words"} for i in INSTRUCTIONS)


@pytest.mark.slow
def test_a_teacher_continues_from_the_teacher_that_it_is_given(trained):
    weights = [
        torch.cat([p.flatten() for p in load_unet(trained / name).parameters()]) for name in ("teacher", "teacher-3")
    ]
    assert 0 < (weights[0] - weights[1]).abs().mean() < 1e-2  # two steps away, not a new start


def load_unet(folder):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet")


@pytest.mark.slow
def test_runs_that_are_done_are_skipped(trained, monkeypatch):
    done = [run.name for run in recipe.PARTS if (trained / run.done).exists()]
    assert done == [run.name for run in recipe.PARTS if run.name != "teacher-2"]  # the fixture leaves it out
    plan = recipe.plan(trained, with_tables=False)
    assert "encoder                    done" in plan
    assert f"in all                     about 0 h {recipe.RUNS['teacher-2'].minutes} min" in plan
    started = []
    monkeypatch.setattr(recipe, "_run_command", lambda command, root, name: started.append((name, command)))
    monkeypatch.setattr("sys.argv", ["vlv.miniature", "--root", str(trained), "--without-tables", "--processes", "2"])
    recipe.main()
    ((name, command),) = started
    assert name == "teacher-2" and command[-5:-2] == [str(trained), "--worker", "teacher-2"]
    assert command[-2:] == ["--device", "cpu"]
    assert "torch.distributed.run" in command and "--nproc_per_node=2" in command


def test_the_plan_alone_starts_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["vlv.miniature", "--root", str(tmp_path / "runs"), "--plan"])
    recipe.main()
    printed = capsys.readouterr().out
    runs = [run.name for run in [*recipe.PARTS, *recipe.VARIANTS]]
    assert all(f"  {name} " in printed for name in [*runs, "tables", "in all"])
    assert not (tmp_path / "runs").exists()


def test_runs_are_in_order_and_the_tables_come_last(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(recipe, "_run_command", lambda command, root, name: started.append((name, command)))
    monkeypatch.setattr("sys.argv", ["vlv.miniature", "--root", str(tmp_path)])
    recipe.main()
    assert [name for name, _ in started] == [*[run.name for run in [*recipe.PARTS, *recipe.VARIANTS]], "tables"]
    page = ["--root", str(tmp_path), "--report", str(tmp_path / "paper_in_miniature.md")]
    assert started[-1][1][1:] == ["-m", "vlv.miniature.paper", *page]
    finished: set[str] = set()
    for run in recipe.RUNS.values():
        assert set(run.inputs.values()) <= finished, run.name
        finished.add(run.output or run.name)


@pytest.mark.parametrize("run", recipe.RUNS.values(), ids=lambda run: run.name)
def test_a_run_passes_the_arguments_of_its_function(run, tmp_path):
    signature = inspect.signature(run.train)
    calls: list[dict] = []
    replace(run, train=lambda *args, **kwargs: calls.append(signature.bind(*args, **kwargs).arguments))(tmp_path)
    (arguments,) = calls
    output, work, *_ = arguments.values()
    assert (tmp_path / run.done).is_relative_to(output) and work == tmp_path / "work" / run.name


class Brightness(nn.Module):
    """Predicts the brightness of an image: a part that is trained in a moment."""

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


@pytest.mark.slow
def test_a_stopped_run_resumes_to_the_weights_of_an_unbroken_one(tmp_path):
    unbroken = train_brightness(tmp_path / "unbroken")
    train_brightness(tmp_path / "stopped", StopAt(5))  # two steps after its last checkpoint
    resumed = train_brightness(tmp_path / "stopped")
    for ours, theirs in zip(resumed, unbroken, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    state = json.loads((tmp_path / "stopped" / "checkpoint-8" / "trainer_state.json").read_text())
    assert [line["step"] for line in state["log_history"] if "loss" in line] == list(range(1, 9))


def test_the_first_recipe_has_no_device_but_the_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["vlv.miniature", "--root", str(tmp_path), "--device", "cuda"])
    with pytest.raises(SystemExit):
        recipe.main()
    assert "--device cuda is for --recipe mmdit" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    root = tmp_path / "runs"
    monkeypatch.setattr("sys.argv", ["vlv.miniature", "--root", str(root), "--recipe", "mmdit", "--device", "cuda"])
    with pytest.raises(SystemExit):
        recipe.main()
    assert "PyTorch finds no GPU here; leave it out" in capsys.readouterr().err and not root.exists()
