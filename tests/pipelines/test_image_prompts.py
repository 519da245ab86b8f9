"""What `encode_image` returns is a prompt for diffusers' pipelines, and words stand beside the image in it."""

import inspect

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from PIL import Image

from vlv.checkpoints import MINIATURE
from vlv.pipelines import VLVPooledReconstructionPipeline, VLVReconstructionPipeline, load_reconstruction

from ..builders import POSITIONS, QUERIES, TEXT_WIDTH, assert_close_to_scale

WORDS = "a frog"  # 4 tokens with BOS and EOS, as many as there are positions beside the caption embeddings
STEPS = {"num_inference_steps": 3, "output_type": "pt"}


@pytest.fixture
def pipe(reconstruction) -> VLVReconstructionPipeline:
    # steps_offset 1: diffusers' Stable Diffusion pipelines set it.
    reconstruction.scheduler = DDIMScheduler.from_config(reconstruction.scheduler.config, steps_offset=1)
    reconstruction.tokenizer.model_max_length = POSITIONS
    return reconstruction


def of_diffusers(pipe: VLVReconstructionPipeline, pipeline_class, **parts):
    """A pipeline of diffusers with the components of a reconstruction pipeline."""
    for name in ("vae", "unet", "tokenizer"):
        parts[name] = getattr(pipe, name)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    parts |= {"text_encoder": pipe.encoder.text_encoder, "scheduler": scheduler}
    pipeline = pipeline_class(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(pipe, count: int = 2) -> torch.Tensor:
    size = pipe.default_size // pipe.vae_scale_factor
    return torch.randn(count, pipe.unet.config.in_channels, size, size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("image_tokens", [1, 5, QUERIES])
def test_prompt_and_negative_embeddings_have_one_shape_at_any_length(pipe, images, image_tokens):
    z = pipe.get_caption_embeds(images[:2])
    encoded = pipe.encode_image(images[:2], image_tokens=image_tokens)
    assert {name: tuple(value.shape) for name, value in encoded.items()} == dict.fromkeys(
        ("prompt_embeds", "negative_prompt_embeds"), (2, image_tokens, TEXT_WIDTH)
    )
    assert torch.equal(encoded["prompt_embeds"], pipe.encode_caption_embeds(z[:, :image_tokens]))
    assert_close_to_scale(encoded["negative_prompt_embeds"], pipe.encode_prompt(["", ""])[:, :image_tokens])
    assert pipe.encode_image(caption_embeds=z)["prompt_embeds"].equal(pipe.encode_image(images[:2])["prompt_embeds"])


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": 1.0},
        {"guidance_scale": 1.0, "image_tokens": 3},
        {"guidance_scale": 3.0, "prompt": WORDS},
        {"guidance_scale": 3.0, "prompt": [WORDS, "a sun"], "image_tokens": 5, "prompt_first": True},
    ],
)
def test_text_to_image_equals_the_reconstruction(pipe, images, settings):
    expected = pipe(images[:2], latents=noise(pipe), **settings, **STEPS).images
    scale = settings.pop("guidance_scale")
    embeds = pipe.encode_image(images[:2], **settings)
    got = of_diffusers(pipe, StableDiffusionPipeline)(
        **embeds, latents=noise(pipe), guidance_scale=scale, height=32, width=32, **STEPS
    ).images
    assert_close_to_scale(got, expected)


def test_inpainting_everything_equals_the_reconstruction_and_a_half_keeps_the_other(pipe, images):
    expected = pipe(
        images[0], prompt=WORDS, latents=noise(pipe, 1), output_type="latent", num_inference_steps=3
    ).images
    inpaint = of_diffusers(pipe, StableDiffusionInpaintPipeline)
    canvas = images[1].resize((32, 32))
    settings = {"latents": noise(pipe, 1), "guidance_scale": 2.0, "height": 32, "width": 32, "num_inference_steps": 3}
    settings |= pipe.encode_image(images[0], prompt=WORDS) | {"output_type": "latent", "image": canvas}
    everything, half = Image.new("L", (32, 32), 255), Image.new("L", (32, 32), 0)
    half.paste(255, (0, 0, 16, 32))
    got = inpaint(mask_image=everything, **settings).images
    assert_close_to_scale(got, expected)
    torch.manual_seed(0)  # the autoencoder draws the latents of the canvas
    kept = [inpaint(mask_image=half, **settings, generator=torch.Generator().manual_seed(1)).images for _ in range(2)]
    other = pipe.encode_image(images[2], prompt=WORDS)
    changed = inpaint(mask_image=half, **settings | other, generator=torch.Generator().manual_seed(1)).images
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(changed[..., 4:], kept[0][..., 4:]) and not torch.equal(changed[..., :4], kept[0][..., :4])


def test_a_new_control_net_leaves_the_reconstruction_as_it_is_and_a_trained_one_changes_it(pipe, images):
    controlnet = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8, 16))
    pipeline = of_diffusers(pipe, StableDiffusionControlNetPipeline, controlnet=controlnet)
    settings = {"latents": noise(pipe, 1), "guidance_scale": 2.0, **STEPS}
    expected = pipe(images[0], prompt=WORDS, **settings).images
    settings |= {"image": images[1].resize((32, 32)), **pipe.encode_image(images[0], prompt=WORDS)}
    assert_close_to_scale(pipeline(**settings).images, expected)
    torch.nn.init.normal_(controlnet.controlnet_mid_block.weight)
    assert (pipeline(**settings).images - expected).abs().max() > 1e-3


@pytest.mark.parametrize("prompt_first", [False, True])
def test_the_words_alone_are_the_prompt_of_image_to_image(pipe, images, prompt_first):
    pipeline = of_diffusers(pipe, StableDiffusionImg2ImgPipeline)
    settings = {"image": images[1].resize((32, 32)), "strength": 0.7, "num_inference_steps": 4, "output_type": "pt"}

    def generate(**prompt) -> torch.Tensor:
        return pipeline(**prompt, **settings, generator=torch.Generator().manual_seed(1)).images

    words = {"prompt": WORDS, "image_tokens": 0, "prompt_first": prompt_first}
    expected = generate(prompt=WORDS, negative_prompt="a sun")
    assert_close_to_scale(generate(**pipe.encode_image(images[0], negative_prompt="a sun", **words)), expected)
    assert (generate(**pipe.encode_image(images[0])) - expected).abs().max() > 1e-3


def test_words_are_beside_the_image_in_the_text_encoder_s_input(pipe, images):
    z = pipe.get_caption_embeds(images[:1])
    ids = pipe.tokenizer(WORDS, padding="max_length", max_length=POSITIONS, return_tensors="pt").input_ids
    table = pipe.encoder.text_encoder.get_input_embeddings().weight
    bos, a, frog, eos, pad = (table[i] for i in ids[0, :5])
    after = pipe.add_prompt(z, WORDS, image_tokens=2)[0]
    assert torch.equal(after, torch.stack([z[0, 0], z[0, 1], a, frog, eos, *[pad] * (POSITIONS - 5)]))
    before = pipe.add_prompt(z, WORDS, image_tokens=2, prompt_first=True)[0]
    assert torch.equal(before, torch.stack([bos, a, frog, z[0, 0], z[0, 1], eos, *[pad] * (POSITIONS - 6)]))
    assert torch.equal(pipe.add_prompt(z, image_tokens=3), z[:, :3]) and torch.equal(pipe.add_prompt(z), z)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_tokens": 9}, "image_tokens is 9; expected 1 to 8"),
        ({"image_tokens": -1, "prompt": WORDS}, "image_tokens is -1; expected 0 to 8"),
        ({"image_tokens": 0}, "image_tokens is 0; expected 1 to 8 .0 needs a prompt"),
        ({"prompt": "a large frog"}, "8 caption embeddings and 5 tokens .* 12 positions; shorten the prompt, or keep"),
        ({"prompt": [WORDS, WORDS]}, "2 prompts for 1 images"),
    ],
)
def test_prompts_that_do_not_fit_are_errors(pipe, images, settings, message):
    for call in (pipe, pipe.encode_image):
        with pytest.raises(ValueError, match=message):
            call(images[0], **settings)


def test_a_prompt_without_tokenizer_and_prompt_embeds_as_caption_embeds_are_errors(pipe, images):
    with pytest.raises(ValueError, match="caption_embeds must be a tensor of get_caption_embeds, got dict"):
        pipe(caption_embeds=pipe.encode_image(images[0]))
    pipe.tokenizer = None
    with pytest.raises(ValueError, match="prompt needs the text encoder's tokenizer"):
        pipe(images[0], prompt=WORDS, guidance_scale=1.0)


def test_both_reconstruction_pipelines_take_the_same_words():
    for name in ("add_prompt", "__call__"):
        one, other = (
            inspect.signature(getattr(cls, name)).parameters
            for cls in (VLVReconstructionPipeline, VLVPooledReconstructionPipeline)
        )
        assert [one[key] for key in ("prompt", "image_tokens", "prompt_first")] == [
            other[key] for key in ("prompt", "image_tokens", "prompt_first")
        ]


@pytest.mark.slow
def test_the_miniature_is_an_image_prompt_for_diffusers():
    pipe = load_reconstruction(MINIATURE)
    pipe.set_progress_bar_config(disable=True)
    words, image = {"prompt": "a large sun at the top right"}, "examples/images/test-1.png"
    expected = pipe(image, **words, latents=noise(pipe, 1), **STEPS).images
    settings = {"latents": noise(pipe, 1), "guidance_scale": 2.0, "height": 64, "width": 64, **STEPS}
    text_to_image = of_diffusers(pipe, StableDiffusionPipeline)
    assert_close_to_scale(text_to_image(**pipe.encode_image(image, **words), **settings).images, expected, 1e-4)
    canvas = Image.open(image).convert("RGB")
    controlnet = ControlNetModel.from_unet(pipe.unet)
    controlled = of_diffusers(pipe, StableDiffusionControlNetPipeline, controlnet=controlnet)
    got = controlled(**pipe.encode_image(image, **words), image=canvas, **settings).images
    assert_close_to_scale(got, expected, 1e-4)
    image_to_image = of_diffusers(pipe, StableDiffusionImg2ImgPipeline)
    settings = {"image": canvas, "strength": 0.7, "guidance_scale": 2.0, **STEPS}
    results = [
        image_to_image(
            **pipe.encode_image(image, **given), **settings, generator=torch.Generator().manual_seed(1)
        ).images
        for given in ({}, words)
    ]
    assert (results[0] - results[1]).abs().max() > 0.1
