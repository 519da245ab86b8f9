"""Modular Diffusers loads a pushed model, with the text-to-image model of another repository."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ClassifierFreeGuidance, ModularPipeline, UNet2DConditionModel
from PIL import Image

from vlv import VLVModel
from vlv import hub as vlv_hub
from vlv.checkpoints import MINIATURE
from vlv.cli.main import main
from vlv.diffusion_decoder import StableDiffusionXLDecoder
from vlv.hub.load import load_diffusion_components
from vlv.pipelines import load_reconstruction, modular_vlv_sd, modular_vlv_sdxl

from ..builders import assert_close_to_scale, stable_diffusion_parts, vlv_config
from .machine import Machine
from .server import Hub, serve

TEXT_TO_IMAGE = {"org/vlv": "org/text-to-image", "org/vlv-xl": "org/text-to-image-xl"}
WORDS = {"prompt": "a frog", "image_tokens": 5, "prompt_first": True}  # without any, guidance has fewer positions
READ = f"""
import json, sys, torch
from diffusers import ClassifierFreeGuidance, DiffusionPipeline, ModularPipeline, ModularPipelineBlocks
trusted, settings = {{"trust_remote_code": True}}, {{"num_inference_steps": 2, "output_type": "pt"}}
for repo in {list(TEXT_TO_IMAGE)}:
    image, folder = sys.argv[1:]
    found = {{}}
    def generator():
        return torch.Generator().manual_seed(0)
    block = ModularPipelineBlocks.from_pretrained(repo, **trusted).sub_blocks["image_encoder"]
    pipeline = block.init_pipeline(repo)
    pipeline.load_components(**trusted)
    found["parts of the encoder"] = sorted(pipeline.components)
    words = {WORDS} | {{"negative_prompt": "a sun"}}
    found["embeds"] = pipeline(image_prompt=image, **words, output=list(block.embeds))
    pipeline = ModularPipeline.from_pretrained(repo, **trusted)
    pipeline.load_components(**trusted)
    pipeline.set_progress_bar_config(disable=True)
    found["words"] = pipeline(image_prompt=image, **{WORDS}, **settings, generator=generator(), output="images")
    pipeline.update_components(guider=ClassifierFreeGuidance(guidance_scale=1.0))
    two = {{"image_prompt": [image, image], "num_images_per_prompt": 2}}
    found["image"] = pipeline(**two, **settings, generator=generator(), output="images")
    standard = DiffusionPipeline.from_pretrained(repo, **trusted)
    standard.set_progress_bar_config(disable=True)
    found["standard"] = standard(image, **{WORDS}, **settings, generator=generator()).images
    torch.save(found, folder + "/" + repo.replace("/", "-"))
print("null")
"""


@pytest.fixture(scope="module")
def xl_model(tmp_path_factory, image_processor, stable_diffusion_xl) -> Path:
    """An untrained stage-1 model for a Stable Diffusion XL, and a copy of it."""
    folder = tmp_path_factory.mktemp("xl")
    torch.manual_seed(0)
    settings = StableDiffusionXLDecoder.text_settings(2)
    encoders = {
        name: encoder_class.from_pretrained(stable_diffusion_xl, subfolder=name)
        for name, encoder_class in StableDiffusionXLDecoder.text_encoders.items()
    }
    encoder = VLVModel(vlv_config(**{f"{k}_config": v.config for k, v in encoders.items()}, **settings)).eval()
    for own, loaded in zip(encoder.text_encoders, encoders.values(), strict=True):
        own.load_state_dict(loaded.state_dict())
    vlv_hub.export(folder, encoder=encoder, image_processor=image_processor, diffusion_model=stable_diffusion_xl)
    return folder


@pytest.fixture(scope="module")
def read(tmp_path_factory, model, xl_model, stable_diffusion, stable_diffusion_xl, image_file):
    """`(hub, what a process without this package made of two repositories)`."""
    hub, folder = Hub(), tmp_path_factory.mktemp("modular")
    with serve(hub) as endpoint:
        pushes = []
        for (repo, other), source, decoder in zip(
            TEXT_TO_IMAGE.items(), (model, xl_model), (stable_diffusion, stable_diffusion_xl), strict=True
        ):
            hub.add_folder(other, decoder)
            options = ("--diffusion-model", other, "--by-reference", "--token", "hf_org")
            pushes.append(["push", str(source), repo, *options])
        push = f"from vlv.cli.main import main; import sys; sys.exit(max([main(push) for push in {pushes}]))"
        pushed = Machine(folder / "owner", endpoint).python(push)
        assert pushed.returncode == 0, pushed.stderr
        hub.forget_traffic()
        Machine(folder / "reader", endpoint).without_package(READ, image_file, folder)
    yield hub, {repo: torch.load(folder / repo.replace("/", "-")) for repo in TEXT_TO_IMAGE}


@pytest.mark.slow
@pytest.mark.parametrize("repo", TEXT_TO_IMAGE)
def test_blocks_without_the_package_give_the_reconstruction(read, repo, model, xl_model, image_file):
    found = read[1][repo]
    pipeline = load_reconstruction({"org/vlv": model, "org/vlv-xl": xl_model}[repo])
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline.encode_image(image_file, negative_prompt="a sun", **WORDS)
    assert found["embeds"].keys() == expected.keys()
    for name, rows in expected.items():
        assert_close_to_scale(found["embeds"][name], rows)

    def reconstruct(image, **settings) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline(image, num_inference_steps=2, output_type="pt", generator=generator, **settings).images

    words = reconstruct(image_file, **WORDS)
    assert_close_to_scale(found["words"], words)
    assert_close_to_scale(found["standard"], words)
    several = reconstruct([image_file, image_file], guidance_scale=1.0, num_images_per_prompt=2)
    assert_close_to_scale(found["image"], several)


@pytest.mark.slow
@pytest.mark.parametrize("repo", TEXT_TO_IMAGE)
def test_the_text_to_image_model_is_downloaded_once_and_from_its_own_repository(read, repo):
    hub, found = read
    other = TEXT_TO_IMAGE[repo]
    assert not [name for name in hub.repos[repo].at("main").files if name.startswith(("unet/", "vae/", "tokenizer/"))]
    sent = {name: size for name, size in hub.downloads.items() if name.endswith(".safetensors")}
    files = {f"{name}/{file}": data for name in hub.repos for file, data in hub.repos[name].at("main").files.items()}
    assert {name: len(files[name]) for name in sent} == sent
    own = {name for name in sent if name.startswith((f"{repo}/", f"{other}/"))}
    weights = {f"{other}/{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")}
    assert own == weights | {f"{repo}/encoder/model.safetensors"}
    index = json.loads(files[f"{repo}/modular_model_index.json"])
    assert index["unet"][2]["revision"] == hub.repos[other].branches["main"]
    parts = {"encoder", "guider", "tokenizer", "vlv_image_processor"} | ({"tokenizer_2"} if "xl" in repo else set())
    assert set(found[repo]["parts of the encoder"]) == parts


@pytest.mark.slow
def test_the_documented_code_loads_a_folder_in_place_of_the_repository_that_it_names(tmp_path):
    folder = tmp_path / "vlv"
    assert main(["push", str(MINIATURE), "org/vlv", "--output", str(folder)]) == 0
    section = (
        Path("docs/image_prompts.md").read_text(encoding="utf-8").split("## Modular Diffusers")[1].split("\n## ")[0]
    )
    results: dict = {}
    for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        code = code.replace('"org/vlv"', repr(str(folder))).replace("outputs/", f"{tmp_path}/")
        exec(code.replace("image_tokens=12", "image_tokens=12, num_inference_steps=4"), results)
    reconstruction = load_reconstruction(MINIATURE)
    reconstruction.set_progress_bar_config(disable=True)
    image, seed = "examples/images/test-1.png", torch.Generator().manual_seed(0)
    words = {"prompt": "a large frog at the bottom left", "image_tokens": 12, "num_inference_steps": 4}
    expected = reconstruction(image, guidance_scale=3.0, generator=seed, output_type="np", **words).images[0]
    assert np.abs(np.asarray(Image.open(tmp_path / "modular.png")) / 255 - expected).max() < 0.01
    for name, rows in reconstruction.encode_image(image).items():
        assert_close_to_scale(results["embeds"][name], rows)


def modular(blocks, model: Path, **replaced) -> ModularPipeline:
    """A pipeline of blocks of the installed package, with the components of a model."""
    encoder, image_processor = vlv_hub.load_encoder(model)
    parts = load_diffusion_components(model) | {"encoder": encoder, "vlv_image_processor": image_processor} | replaced
    settings = {name: parts.pop(name) for name in list(parts) if isinstance(parts[name], bool)}
    pipeline = blocks.VLVBlocks().init_pipeline()
    pipeline.update_components(**parts, **settings)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.slow
def test_a_decoder_that_does_not_fit_is_an_error(model, xl_model, image_file):
    wide = UNet2DConditionModel.from_config(stable_diffusion_parts()["unet"].config, cross_attention_dim=48)
    xl = load_diffusion_components(xl_model)["unet"]
    pooled = UNet2DConditionModel.from_config(xl.config, projection_class_embeddings_input_dim=6 * 8 + 30)
    for blocks, source, unet, message in (
        (modular_vlv_sd, model, wide, "the UNet reads prompt_embeds of width 48, and those of this VLV have 32; load"),
        (
            modular_vlv_sd,
            model,
            xl,
            "of another family .* addition_embed_type is 'text_time', expected None; load unet",
        ),
        (
            modular_vlv_sdxl,
            xl_model,
            wide,
            "addition_embed_type is None, expected 'text_time'; load unet and vae from",
        ),
        (modular_vlv_sdxl, xl_model, pooled, "reads pooled_prompt_embeds of width 30, and those of this VLV have 20"),
    ):
        with pytest.raises(ValueError, match=message):
            modular(blocks, source, unet=unet)(image_prompt=str(image_file))


def test_components_that_are_not_loaded_are_named(model, image_file):
    pipeline = modular_vlv_sd.VLVBlocks().init_pipeline()
    with pytest.raises(
        ValueError, match="encoder, vlv_image_processor, tokenizer of the pipeline are not loaded; call"
    ):
        pipeline(image_prompt=str(image_file))
    with pytest.raises(ValueError, match="unet, vae of the pipeline are not loaded"):
        modular(modular_vlv_sd, model, unet=None, vae=None)(image_prompt=str(image_file))
    with pytest.raises(ValueError, match="Required input 'image_prompt' is missing"):
        pipeline(prompt="a frog")


@pytest.mark.slow
def test_a_denoiser_of_another_precision_and_a_guider_that_is_off(model, image_file):
    half = load_diffusion_components(model, dtype=torch.bfloat16)
    pipeline = modular(modular_vlv_sd, model, guider=ClassifierFreeGuidance(guidance_scale=1.0), **half)
    state = pipeline(image_prompt=str(image_file), num_inference_steps=1, height=16, width=16)
    assert state.prompt_embeds.dtype == torch.bfloat16 and state.negative_prompt_embeds is None
    assert state.images[0].size == (16, 16)


@pytest.mark.slow
def test_images_have_the_size_that_the_model_reconstructs_or_a_given_one(model, image_file):
    pipeline = modular(modular_vlv_sd, model, guider=ClassifierFreeGuidance(guidance_scale=1.0))
    pipeline.vlv_image_processor.pre_crop_size = 16  # the UNet was trained on 32
    settings = {"image_prompt": str(image_file), "num_inference_steps": 1, "output": "images"}
    assert pipeline(**settings)[0].size == (16, 16)
    assert pipeline(**settings, height=24)[0].size == (16, 24)


@pytest.mark.slow
def test_image_to_image_of_stable_diffusion_xl_takes_an_image_prompt(xl_model, image_file, images):
    pipeline = modular(modular_vlv_sdxl, xl_model)
    settings = {"strength": 0.5, "num_inference_steps": 4, "output_type": "pt"}
    results = [
        pipeline(
            image_prompt=str(image_file), image=image, generator=torch.Generator().manual_seed(0), **settings
        ).images
        for image in (images[0].resize((48, 32)), images[2].resize((48, 32)))
    ]
    assert results[0].shape == (1, 3, 32, 48) and not torch.equal(*results)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ([], "and .* holds a copy"),
        (["--diffusion-model", "checkpoints/vlv-miniature"], "and checkpoints/vlv-miniature is a folder"),
        (["--diffusion-model", "/there/is/none"], "and /there/is/none is a folder"),
    ],
)
def test_only_a_repository_can_be_referred_to(options, found, tmp_path, capsys):
    pushed = main(["push", str(MINIATURE), "org/vlv", "--by-reference", *options, "--output", str(tmp_path / "new")])
    message = capsys.readouterr().err
    assert pushed == 2 and re.search(
        rf"by_reference \(--by-reference\) needs .* of the Hub, {found}; name one", message
    )
    assert not (tmp_path / "new").exists()
