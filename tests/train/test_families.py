"""Stage 1 and all that follows with each family of text-to-image models, by the same commands."""

import pytest
import torch
from PIL import Image

from vlv import VLVModel, hub
from vlv.cli.main import main
from vlv.diffusion_decoder import family_of
from vlv.pipelines import generate_images, load_reconstruction
from vlv.train import stage1, stage2

from ..builders import vlv_config
from ..hub.machine import Machine
from ..hub.server import Hub, serve

pytestmark = pytest.mark.slow
COMMON = {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "dataloader_num_workers": 0}
COMMON |= {"num_validation_images": 2, "use_cpu": True, "disable_tqdm": True, "save_steps": 6, "logging_steps": 1}

RECONSTRUCT = """
import json, sys, torch
from diffusers import DiffusionPipeline
from transformers import pipeline
source, image = sys.argv[1:]
found = {"caption": pipeline("image-to-text", source, trust_remote_code=True)(image, max_new_tokens=5)}
pipe = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
images = pipe(image, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
found["sum"] = images.double().sum().item()
pipe.save_pretrained("resaved")
pipe = DiffusionPipeline.from_pretrained("resaved", trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
images = pipe(image, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
found["again"] = images.double().sum().item()
print(json.dumps(found))
"""


def arguments(**settings) -> list[str]:
    return [f"--{name}={value}" for name, value in (COMMON | settings).items()]


@pytest.fixture
def image_file(image_folder):
    return image_folder / "a" / "1.png"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, stable_diffusion_xl, image_folder, language_model):
    """The folder of a run of each stage, the first one resumed in the middle."""
    root = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    VLVModel(vlv_config()).image_encoder.save_pretrained(root / "florence")
    start = {"image_encoder": root / "florence", "diffusion_model": stable_diffusion_xl, "images": image_folder}
    start |= {"encoder_image_size": 64, "pre_crop_size": 0, "diffusion_image_size": 32, "num_query_tokens": 8}
    start |= {"timestep_sampling": "stratified", "trainable": "all", "lr_scheduler_type": "constant"}
    unbroken = stage1.main(arguments(output_dir=root / "unbroken", max_steps=12, validation_steps=12, **start))
    stage1.main(arguments(output_dir=root / "stage1", max_steps=6, validation_steps=0, **start))
    stage1.main(arguments(output_dir=root / "stage1", max_steps=12, validation_steps=0, **start))
    model = {"model": root / "stage1", "language_model": language_model, "pairs": image_folder}
    stage2.main(arguments(output_dir=root / "stage2", max_steps=2, validation_steps=0, **model))
    return root, unbroken


def test_ten_steps_lower_the_loss_and_a_resumed_run_is_the_same(runs):
    root, unbroken = runs
    losses = [entry["loss"] for entry in unbroken.state.log_history if "loss" in entry]
    assert len(losses) == 12 and sum(losses[-3:]) < sum(losses[:3])
    weights = [hub.load_encoder(root / name)[0].state_dict() for name in ("unbroken", "stage1")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert Image.open(root / "unbroken" / "samples" / "step-0000012.png").size == (64, 64)


def test_the_frozen_text_encoders_are_the_text_to_image_models(runs, stable_diffusion_xl):
    root, _ = runs
    model = hub.load_encoder(root / "stage1")[0]
    family = family_of(stable_diffusion_xl)
    for own, loaded in zip(model.text_encoders, family.load_text_encoders(str(stable_diffusion_xl)), strict=True):
        state = loaded.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in own.state_dict().items())


def test_commands_describe_and_use_it(runs, image_file, tmp_path, capsys):
    root, _ = runs
    main(["info", str(root / "stage1")])
    assert "8 x 80" in (printed := capsys.readouterr().out) and "in another place" in printed
    main(
        [
            "reconstruct",
            "--num-inference-steps",
            "2",
            str(image_file),
            "--model",
            str(root / "stage2"),
            "--output-dir",
            str(tmp_path / "out"),
        ]
    )
    assert (tmp_path / "out" / "1.png").is_file()
    main(["encode", str(image_file), "--model", str(root / "stage1"), "--output", str(tmp_path / "z.safetensors")])
    captions = tmp_path / "captions.json"
    main(
        ["caption", "--embeddings", str(tmp_path / "z.safetensors"), "--model", str(root / "stage2")]
        + ["--output", str(captions)]
    )
    assert image_file.name in captions.read_text()


def test_pushed_it_loads_over_http_without_the_package(runs, image_file, tmp_path):
    root, _ = runs
    with serve(Hub()) as endpoint:
        owner = Machine(tmp_path / "owner", endpoint)
        done = owner.vlv("push", root / "stage2", "org/vlv", "--token", "hf_org")
        assert done.returncode == 0, done.stderr
        found = Machine(tmp_path / "user", endpoint).without_package(RECONSTRUCT, "org/vlv", image_file)
        described = owner.vlv("info", "org/vlv").stdout
    pipeline = load_reconstruction(root / "stage2")
    pipeline.set_progress_bar_config(disable=True)
    expected = generate_images(pipeline, image=[str(image_file)], seeds=[0], num_inference_steps=2)
    assert [found["sum"], found["again"]] == pytest.approx([expected.double().sum().item()] * 2, rel=1e-5)
    assert "Stable Diffusion XL (UNet2DConditionModel, " in described and "text encoder 2" in described


def test_a_decoder_of_another_family_is_an_error_that_names_both(runs, stable_diffusion, image_folder, tmp_path):
    root, _ = runs
    start = {"model": root / "stage1", "diffusion_model": stable_diffusion, "images": image_folder}
    with pytest.raises(SystemExit, match=f"{root / 'stage1'} and {stable_diffusion} do not fit together"):
        stage1.main(arguments(output_dir=tmp_path, max_steps=1, **start))
