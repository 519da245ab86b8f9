"""Modular Diffusers loads a pushed model, with the text-to-image model of another repository."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import ClassifierFreeGuidance, ModularPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging

from vlv import VLVModel
from vlv import hub as vlv_hub
from vlv.checkpoints import MINIATURE
from vlv.cli.main import main
from vlv.diffusion_decoder import StableDiffusionXLDecoder
from vlv.hub.load import load_diffusion_components
from vlv.pipelines import build_reconstruction, load_reconstruction, modular_vlv_sd, modular_vlv_sdxl

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
        owner = Machine(folder / "owner", endpoint)
        for (repo, other), source, decoder in zip(
            TEXT_TO_IMAGE.items(), (model, xl_model), (stable_diffusion, stable_diffusion_xl), strict=True
        ):
            hub.add_folder(other, decoder)
            options = ("--diffusion-model", other, "--by-reference", "--token", "hf_org")
            pushed = owner.vlv("push", source, repo, *options)
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
