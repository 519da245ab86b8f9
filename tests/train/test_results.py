"""What a run leaves: a model that every command, transformers and diffusers open as it lies there."""

import json
import re
import shutil

import pytest
import torch
from PIL import Image

from vlv import hub
from vlv.cli.main import main
from vlv.pipelines import load_reconstruction
from vlv.train import stage1, stage2

from ..hub.machine import Machine
from ..hub.server import nowhere

pytestmark = pytest.mark.slow
COMMON = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
COMMON |= {"dataloader_num_workers": 0, "validation_steps": 0, "use_cpu": True, "disable_tqdm": True}

OPEN = """
import json, sys, torch
from diffusers import DiffusionPipeline
from transformers import pipeline
stage1, stage2, image = sys.argv[1:]
found = {"caption": pipeline("image-to-text", stage2, trust_remote_code=True)(image, max_new_tokens=5)}
for name, folder in {"stage1": stage1, "stage2": stage2}.items():
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(image, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
    found[name] = images.double().sum().item()
pipe.save_pretrained("complete")
found["complete"] = json.load(open("complete/model_index.json"))
print(json.dumps(found))
"""


def arguments(**settings) -> list[str]:
    return [f"--{name}={value}" for name, value in (COMMON | settings).items()]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory, stable_diffusion):
    """A text-to-image model that tests may change."""
    return shutil.copytree(stable_diffusion, tmp_path_factory.mktemp("decoder") / "stable-diffusion")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, stage1_checkpoint, decoder, image_folder, language_model):
    """The folder of a run of each stage, one after the other. Stage 2 changes the encoder."""
    root = tmp_path_factory.mktemp("runs")
    start = {"model": stage1_checkpoint, "diffusion_model": decoder, "images": image_folder}
    stage1.main(arguments(output_dir=root / "stage1", **start))
    model = {"model": root / "stage1", "language_model": language_model, "pairs": image_folder}
    stage2.main(arguments(output_dir=root / "stage2", trainable="all", **model))
    return root


@pytest.fixture
def image(tmp_path, images):
    images[1].save(tmp_path / "image.png")
    return tmp_path / "image.png"


def reconstruct(folder, image) -> float:
    pipe = load_reconstruction(folder)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(str(image), num_inference_steps=2, generator=generator, output_type="pt").images.double().sum().item()


def test_transformers_and_diffusers_open_it_without_the_package(runs, image, tmp_path):
    machine = Machine(tmp_path / "machine", nowhere())
    found = machine.without_package(OPEN, runs / "stage1", runs / "stage2" / "checkpoint-1", image)
    assert isinstance(found["caption"][0]["generated_text"], str)
    assert found["stage1"] == pytest.approx(reconstruct(runs / "stage1", image), rel=1e-5)
    assert found["stage2"] == pytest.approx(found["stage1"], rel=1e-5)  # by the encoder that stage 1 has trained
    assert found["complete"]["unet"][1] == "UNet2DConditionModel" and "diffusion_model" not in found["complete"]


@pytest.mark.parametrize("folder", ["stage2", "stage2/checkpoint-1"])
def test_every_command_opens_it(runs, folder, image, tmp_path, capsys):
    model = str(runs / folder)
    for command in (
        ["caption", image, "--model", model, "--max-new-tokens", 3, "--output", tmp_path / "captions.json"],
        ["encode", image, "--model", model, "--for", "caption", "--output", tmp_path / "embeddings.safetensors"],
        ["reconstruct", image, "--model", model, "--num-inference-steps", 1, "--output-dir", tmp_path / "images"],
        ["push", model, "org/name", "--output", tmp_path / "repository"],
    ):
        assert main([*map(str, command)]) == 0, capsys.readouterr().err
    assert reconstruct(tmp_path / "repository", image) == pytest.approx(reconstruct(model, image), rel=1e-5)
    assert (tmp_path / "repository" / "unet").is_dir() and not (runs / folder / "unet").exists()
    captions = [hub.load_captioner(place)[0].state_dict() for place in (model, tmp_path / "repository")]
    assert all(captions[0][name].equal(captions[1][name]) for name in captions[0])
    published = [path for path in (tmp_path / "repository").rglob("*") if path.suffix in (".json", ".md")]
    assert published and not [path for path in published if str(runs.parent) in path.read_text()]
    assert main(["info", model]) == 0
    assert "text-to-image model: in another place: " in capsys.readouterr().out


def test_it_names_what_it_was_trained_with(runs, decoder, language_model, image_folder):
    training = json.loads((runs / "stage2" / hub.TRAINING_FILE).read_text())
    assert training["stage1"]["diffusion_model"] == str(decoder)
    assert training["stage1"]["fingerprints"]["diffusion_model"] == hub.fingerprint(decoder)
    assert training["stage2"]["model"] == str(runs / "stage1") and training["stage2"]["pairs"] == str(image_folder)
    assert training["stage2"]["fingerprints"]["language_model"] == hub.fingerprint(language_model)


def test_a_model_brings_its_text_to_image_model(runs, decoder, image_folder, tmp_path):
    trainer = stage1.main(arguments(output_dir=tmp_path, model=runs / "stage1", images=image_folder, max_steps=1))
    assert trainer.provenance.diffusion_model.source == str(decoder)


def test_the_text_to_image_model_is_copied_in_on_demand(runs, image_folder, image, tmp_path):
    settings = {"model": runs / "stage1", "images": image_folder, "max_steps": 1, "export_decoder": True}
    stage1.main(arguments(output_dir=tmp_path / "run", **settings))
    assert (tmp_path / "run" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    stage1.main(arguments(output_dir=tmp_path / "again", **(settings | {"export_decoder": False})))
    stage1.main(arguments(output_dir=tmp_path / "again", **settings))  # the run has ended
    assert (tmp_path / "again" / "unet").is_dir()
    assert hub.has_own_diffusion_model(tmp_path / "run") and reconstruct(tmp_path / "run", image) > 0


@pytest.mark.parametrize(
    ("stage", "settings", "message"),
    [
        (stage1, {"model": "runs/stage1", "image_encoder": "org/florence"}, "image_encoder is org/florence, but"),
        (stage1, {"model": "checkpoint"}, "diffusion_model is not set, and .* does not name the one"),
        (stage2, {"model": "runs/stage2", "language_model": "org/lm"}, "language_model is org/lm, but .* captioner"),
    ],
)
def test_a_setting_that_the_model_decides_is_refused(
    stage, settings, message, runs, stage1_checkpoint, image_folder, tmp_path, capsys
):
    places = {"checkpoint": stage1_checkpoint, "runs/stage1": runs / "stage1", "runs/stage2": runs / "stage2"}
    settings = {**settings, "model": places[settings["model"]]}
    settings["images" if stage is stage1 else "pairs"] = image_folder
    with pytest.raises(SystemExit) as ended:
        stage.main(arguments(output_dir=tmp_path, **settings))
    assert ended.value.code == 2 and re.search(message, capsys.readouterr().err)


def test_a_text_to_image_model_that_changed_or_is_gone_is_named(runs, decoder, image, tmp_path, capsys):
    command = ["reconstruct", str(image), "--model", str(runs / "stage1"), "--output-dir", str(tmp_path / "images")]
    config = decoder / "scheduler" / "scheduler_config.json"
    before = config.read_text()
    config.write_text(before.replace("scaled_linear", "linear"))
    assert main(command) == 2
    assert "was trained with another text-to-image model than" in capsys.readouterr().err
    config.write_text(before)
    moved = decoder.rename(decoder.with_name("elsewhere"))
    assert main(command) == 2
    assert f"{decoder}, which is not there; `vlv push" in capsys.readouterr().err
    push = ["push", str(runs / "stage1"), "org/name", "--diffusion-model", str(moved), "--output"]
    assert main([*push, str(tmp_path / "joined")]) == 0
    moved.rename(decoder)
    assert reconstruct(tmp_path / "joined", image) == pytest.approx(reconstruct(runs / "stage1", image), rel=1e-5)


def test_the_reconstructions_of_a_checkpoint_are_images(runs, image):
    pipe = load_reconstruction(runs / "stage1" / "checkpoint-1")
    assert isinstance(pipe(str(image), num_inference_steps=1).images[0], Image.Image)
