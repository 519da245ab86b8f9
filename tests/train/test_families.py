"""Stage 1 and all that follows with each family of text-to-image models, by the same commands."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import set_seed

from vlv import VLVModel, hub
from vlv.cli.main import main
from vlv.diffusion_decoder import Conditioning, family_of
from vlv.pipelines import generate_images, load_reconstruction
from vlv.tokenizer import load_tokenizer
from vlv.train import stage1, stage2
from vlv.train.stage1_trainer import Stage1Trainer

from ..builders import TEXT_2_WIDTH, TEXT_3_WIDTH, TEXT_WIDTH, vlv_config
from ..hub.machine import Machine
from ..hub.server import Hub, serve

pytestmark = pytest.mark.slow
COMMON = {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "dataloader_num_workers": 0}
COMMON |= {"num_validation_images": 2, "use_cpu": True, "disable_tqdm": True, "save_steps": 6, "logging_steps": 1}

PUSH = """
import sys
from vlv.cli.main import main
folders, repositories = sys.argv[1].split(","), sys.argv[2].split(",")
for folder, repository in zip(folders, repositories, strict=True):
    assert main(["push", folder, repository, "--token", "hf_org"]) == 0
    assert main(["info", repository]) == 0
"""
RECONSTRUCT = """
import json, sys, torch
from diffusers import DiffusionPipeline
from transformers import pipeline

def reconstruct(source):
    pipe = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipe(image, num_inference_steps=2, generator=generator, output_type="pt").images
    return pipe, images.double().sum().item()

repositories, image = sys.argv[1].split(","), sys.argv[2]
found = {}
for source in repositories:
    pipeline("image-to-text", source, trust_remote_code=True)(image, max_new_tokens=5)
    pipe, before = reconstruct(source)
    pipe.save_pretrained(f"resaved-{source}")
    found[source] = [before, reconstruct(f"resaved-{source}")[1]]
print(json.dumps(found))
"""


def arguments(**settings) -> list[str]:
    return [f"--{name}={value}" for name, value in (COMMON | settings).items()]


@pytest.fixture
def image_file(image_folder):
    return image_folder / "a" / "1.png"


@dataclass
class Runs:
    """A run of each stage, the first one once more from its middle.

    Args:
        diffusion_model: Folder of the text-to-image model.
        title: What `vlv info` says of the family.
        root: Has the folders `unbroken`, `stage1` (the same training resumed from a checkpoint) and `stage2`.
        unbroken: Its trainer.
    """

    diffusion_model: Path
    title: str
    root: Path
    unbroken: Stage1Trainer


TITLES = {
    "stable_diffusion_xl": "Stable Diffusion XL (UNet2DConditionModel, ",
    "stable_diffusion_3": (
        "Stable Diffusion 3 or 3.5 (SD3Transformer2DModel, FlowMatchEulerDiscreteScheduler, predicts velocity "
    ),
}


@pytest.fixture(scope="module")
def florence(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("florence")
    torch.manual_seed(0)
    VLVModel(vlv_config()).image_encoder.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def start(florence, image_folder) -> dict:
    """Settings of stage 1 from scratch, without the text-to-image model."""
    sizes = {"encoder_image_size": 64, "pre_crop_size": 0, "diffusion_image_size": 32, "num_query_tokens": 8}
    return {"image_encoder": florence, "images": image_folder, "trainable": "all", **sizes}


@pytest.fixture(scope="module")
def all_runs(request, tmp_path_factory, start, image_folder, language_model) -> dict[str, Runs]:
    return {
        name: train(request.getfixturevalue(name), name, tmp_path_factory, start, language_model) for name in TITLES
    }


def train(diffusion_model: Path, name: str, tmp_path_factory, start: dict, language_model: Path) -> Runs:
    root = tmp_path_factory.mktemp("runs")
    settings = {**start, "diffusion_model": diffusion_model, "lr_scheduler_type": "constant"}
    settings |= {"timestep_sampling": "stratified"}
    unbroken = stage1.main(arguments(output_dir=root / "unbroken", max_steps=10, validation_steps=10, **settings))
    shutil.copytree(root / "unbroken" / "checkpoint-6", root / "stage1" / "checkpoint-6")  # all that a kill leaves
    stage1.main(arguments(output_dir=root / "stage1", max_steps=10, validation_steps=0, **settings))
    model = {"model": root / "stage1", "language_model": language_model, "pairs": start["images"]}
    stage2.main(arguments(output_dir=root / "stage2", max_steps=2, validation_steps=0, **model))
    return Runs(diffusion_model, TITLES[name], root, unbroken)


@pytest.fixture(params=TITLES)
def runs(request, all_runs) -> Runs:
    return all_runs[request.param]


@torch.no_grad()
def loss_of(runs: Runs, model: VLVModel) -> float:
    """The loss of a model for all training images, with fixed noise."""
    trainer, generator = runs.unbroken, torch.Generator().manual_seed(0)
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(16)])
    decoder = trainer.diffusion_decoder
    latents = decoder.encode_images(batch["diffusion_pixels"] / 127.5 - 1, generator)
    noise, timesteps = torch.randn(latents.shape, generator=generator), torch.linspace(0, 999, len(latents)).long()
    conditioning = Conditioning.of(model.eval()(pixel_values=batch["pixel_values"]))
    return decoder.denoising_loss(latents, conditioning, noise, timesteps).item()


def test_ten_steps_lower_the_loss_and_a_resumed_run_is_the_same(runs):
    root = runs.root
    set_seed(runs.unbroken.args.seed)
    untrained, _ = stage1.load_model(runs.unbroken.args, runs.diffusion_model, family_of(runs.diffusion_model))
    assert loss_of(runs, runs.unbroken.model) < 0.99 * loss_of(runs, untrained)
    weights = [hub.load_encoder(root / name)[0].state_dict() for name in ("unbroken", "stage1")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert Image.open(root / "unbroken" / "samples" / "step-0000010.png").size == (64, 64)


def test_the_frozen_text_encoders_are_the_text_to_image_models(runs):
    root = runs.root
    model = hub.load_encoder(root / "stage1")[0]
    family = family_of(runs.diffusion_model)
    for own, loaded in zip(model.text_encoders, family.load_text_encoders(str(runs.diffusion_model)), strict=True):
        state = loaded.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in own.state_dict().items())


def test_commands_describe_and_use_it(runs, image_file, tmp_path, capsys):
    root = runs.root
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
    assert list((tmp_path / "out").rglob("1.png.png"))
    main(["encode", str(image_file), "--model", str(root / "stage1"), "--output", str(tmp_path / "z.safetensors")])
    captions = tmp_path / "captions.json"
    main(
        ["caption", "--embeddings", str(tmp_path / "z.safetensors"), "--model", str(root / "stage2")]
        + ["--output", str(captions)]
    )
    assert image_file.name in captions.read_text()


def test_pushed_it_loads_over_http_without_the_package(all_runs, image_file, tmp_path):
    repositories = {f"org/{name}": runs for name, runs in all_runs.items()}
    folders = ",".join(str(runs.root / "stage2") for runs in all_runs.values())
    with serve(Hub()) as endpoint:
        pushed = Machine(tmp_path / "owner", endpoint).python(PUSH, folders, ",".join(repositories))
        assert pushed.returncode == 0, pushed.stderr
        found = Machine(tmp_path / "user", endpoint).without_package(RECONSTRUCT, ",".join(repositories), image_file)
    for repository, runs in repositories.items():
        assert runs.title in pushed.stdout and "text encoder 2" in pushed.stdout
        pipeline = load_reconstruction(runs.root / "stage2")
        pipeline.set_progress_bar_config(disable=True)
        expected = generate_images(pipeline, image=[str(image_file)], seeds=[0], num_inference_steps=2)
        assert found[repository] == pytest.approx([expected.double().sum().item()] * 2, rel=1e-5)


def test_a_decoder_of_another_family_is_an_error_that_names_both(runs, stable_diffusion, image_folder, tmp_path):
    wrong = {"model": runs.root / "stage1", "diffusion_model": stable_diffusion, "images": image_folder}
    both = f"{runs.root / 'stage1'} and {stable_diffusion} do not fit together"
    with pytest.raises(SystemExit, match=both):
        stage1.main(arguments(output_dir=tmp_path, max_steps=1, **wrong))
    with pytest.raises(ValueError, match=both):
        hub.write_repository(runs.root / "stage1", tmp_path / "pushed", diffusion_model=stable_diffusion)


def test_a_text_encoder_with_other_weights_is_an_error_that_names_both(all_runs, image_folder, tmp_path):
    """Of equal shape, so that nothing else would tell; also where it is stored in half precision."""
    runs = all_runs["stable_diffusion_3"]
    other = tmp_path / "other"
    shutil.copytree(runs.diffusion_model, other)
    file = other / "text_encoder_2" / "model.safetensors"
    weights = load_file(file)
    settings = {"model": runs.root / "stage1", "diffusion_model": other, "images": image_folder}
    save_file({name: tensor.half() for name, tensor in weights.items()}, file, {"format": "pt"})
    hub.check_text_encoders(hub.load_encoder(runs.root / "stage1")[0], other, "runs/a", "org/b")
    name = "text_model.encoder.layers.1.self_attn.v_proj.weight"
    weights[name] = weights[name] * 1.01
    save_file(weights, file, {"format": "pt"})
    both = f"{runs.root / 'stage1'} and {other} do not fit together: text_encoder_2 of {other} has other weights"
    with pytest.raises(SystemExit, match=rf"{both}.* encoder\.layers\.1\.self_attn\.v_proj\.weight.*trained with"):
        stage1.main(arguments(output_dir=tmp_path / "run", max_steps=1, **settings))
    with pytest.raises(ValueError, match=both):
        hub.write_repository(runs.root / "stage1", tmp_path / "pushed", diffusion_model=other)
    encoder, image_processor = hub.load_encoder(runs.root / "stage1")
    with pytest.raises(ValueError, match=f"the model and {other} do not fit together"):
        hub.export(tmp_path / "exported", encoder=encoder, image_processor=image_processor, diffusion_model=other)
    assert not (tmp_path / "exported").exists()
    shutil.rmtree(other / "text_encoder_2")  # a folder that does not hold it is not compared
    hub.export(tmp_path / "exported", encoder=encoder, image_processor=image_processor, diffusion_model=other)


def test_a_tokenizer_with_words_that_the_text_encoder_does_not_know_is_an_error(all_runs, image_folder, tmp_path):
    runs = all_runs["stable_diffusion_xl"]
    other = tmp_path / "other"
    shutil.copytree(runs.diffusion_model, other)
    tokenizer = load_tokenizer(other / "tokenizer_2")
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(other / "tokenizer_2")
    settings = {"model": runs.root / "stage1", "diffusion_model": other, "images": image_folder}
    with pytest.raises(SystemExit, match=f"tokenizer_2 of {other} has 56 words, but the text encoder of .* knows 55"):
        stage1.main(arguments(output_dir=tmp_path / "run", max_steps=1, **settings))


@pytest.fixture(scope="module")
def with_t5(tmp_path_factory, start, stable_diffusion_3) -> Path:
    """A model with T5, after two steps."""
    folder = tmp_path_factory.mktemp("t5") / "stage1"
    settings = {**start, "diffusion_model": stable_diffusion_3, "t5_text_encoder": True, "export_decoder": True}
    settings |= {"embedding_dropout": 0.5, "tail_drop": 0.5, "bf16": True}
    stage1.main(arguments(output_dir=folder, max_steps=2, validation_steps=2, **settings))
    return folder


def test_t5_is_part_of_the_model_on_request(with_t5, image_file, capsys):
    width = TEXT_WIDTH + TEXT_2_WIDTH + TEXT_3_WIDTH
    main(["info", str(with_t5)])
    assert f"8 x {width}" in (printed := capsys.readouterr().out) and "text encoder 3" in printed
    pipeline = load_reconstruction(with_t5)
    pipeline.set_progress_bar_config(disable=True)
    z = pipeline.get_caption_embeds(str(image_file))
    images = [
        pipeline(
            caption_embeds=embeds,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
            negative_prompt="a small dog",
        ).images
        for embeds in (z, torch.cat([z[..., :-TEXT_3_WIDTH], -z[..., -TEXT_3_WIDTH:]], dim=2))
    ]
    assert images[0].shape == (1, 3, 32, 32) and not torch.equal(*images)  # T5's part has an effect


def test_t5_that_is_not_there_is_an_error_that_names_folder_and_setting(
    start, with_t5, all_runs, stable_diffusion_xl, stable_diffusion_3, image_folder, tmp_path
):
    runs = all_runs["stable_diffusion_3"]
    without = tmp_path / "without"
    shutil.copytree(stable_diffusion_3, without, ignore=shutil.ignore_patterns("*_3"))
    index = json.loads((without / "model_index.json").read_text())
    index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (without / "model_index.json").write_text(json.dumps(index))
    run = {"output_dir": tmp_path / "run", "max_steps": 1, "t5_text_encoder": True}
    for folder, reason in {
        without: f"{without} has no text_encoder_3 and no tokenizer_3",
        stable_diffusion_xl: f"{stable_diffusion_xl} is a Stable Diffusion XL",
    }.items():
        with pytest.raises(SystemExit, match=f"t5_text_encoder is set, but {reason}"):
            stage1.main(arguments(**run, **start, diffusion_model=folder))
    with pytest.raises(SystemExit, match=f"t5_text_encoder is True, but {runs.root / 'stage1'} has False"):
        stage1.main(arguments(**run, model=runs.root / "stage1", images=image_folder))
    with pytest.raises(ValueError, match=f"{without} has no tokenizer_3, but .* has 3 text encoders"):
        hub.write_repository(with_t5, tmp_path / "pushed", diffusion_model=without)
