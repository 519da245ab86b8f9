"""The reconstruction pipeline: same seed, same picture, with any scheduler, in every form a diffusers user knows."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image

from vlv.miniature.tokenizer import build_tokenizer
from vlv.pipelines import VLVReconstructionPipeline

from ..conftest import POSITIONS, QUERIES, TEXT_WIDTH, stable_diffusion_parts


@pytest.fixture
def pipe(encoder, image_processor):
    tokenizer = build_tokenizer(for_text_encoder=True)
    pipe = VLVReconstructionPipeline(
        encoder=encoder, **stable_diffusion_parts(), image_processor=image_processor, tokenizer=tokenizer
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def draw(pipe, *arguments, **settings) -> np.ndarray:
    return pipe(*arguments, **{"num_inference_steps": 3, "output_type": "np", **settings}).images


def test_same_seed_same_picture_another_seed_another(pipe, pictures):
    first = draw(pipe, pictures[0], generator=seed(1))
    assert np.array_equal(draw(pipe, pictures[0], generator=seed(1)), first)
    assert not np.array_equal(draw(pipe, pictures[0], generator=seed(2)), first)
    assert not np.array_equal(draw(pipe, pictures[1], generator=seed(1)), first)


def test_with_a_generator_each_a_picture_does_not_depend_on_its_neighbours(pipe, pictures):
    together = draw(pipe, pictures[:3], generator=[seed(i) for i in range(3)])
    for i in range(3):
        np.testing.assert_allclose(draw(pipe, pictures[i], generator=seed(i))[0], together[i], atol=1e-4)


def test_an_image_and_its_embeddings_give_the_same_picture(pipe, pictures):
    z = pipe.encode_image(pictures[:2])
    assert z.shape == (2, QUERIES, TEXT_WIDTH)
    from_embeds = draw(pipe, caption_embeds=z, generator=seed())
    assert np.array_equal(from_embeds, draw(pipe, pictures[:2], generator=seed()))


def test_one_step_by_hand(pipe, pictures):
    """Guidance 2 as in the authors' code: unconditional first, then twice the difference is gone along."""
    latents = torch.randn(1, 4, 8, 8, generator=seed())
    got = pipe(pictures[0], latents=latents, num_inference_steps=1, output_type="latent", generator=seed(5)).images
    told = pipe.encoder.encode_caption_embeds(pipe.encode_image(pictures[0]))
    ids = pipe.tokenizer("", padding="max_length", max_length=POSITIONS, return_tensors="pt").input_ids
    untold = pipe.encoder.text_encoder(ids).last_hidden_state
    pipe.scheduler.set_timesteps(1)
    t = pipe.scheduler.timesteps[0]
    with torch.no_grad():
        without, with_it = pipe.unet(latents, t, untold).sample, pipe.unet(latents, t, told).sample
        noise = without + 2.0 * (with_it - without)
    expected = pipe.scheduler.step(noise, t, latents, generator=seed(5)).prev_sample
    torch.testing.assert_close(got, expected)


def test_without_guidance_there_is_no_unconditional_pass(pipe, pictures):
    calls = []
    pipe.unet.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    draw(pipe, pictures[0], guidance_scale=1.0)
    assert calls == [1, 1, 1]


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        EulerAncestralDiscreteScheduler,
        PNDMScheduler,
        UniPCMultistepScheduler,
    ],
)
def test_any_scheduler(pipe, pictures, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    first = draw(pipe, pictures[0], num_inference_steps=5, generator=seed(1))
    assert np.isfinite(first).all()
    assert np.array_equal(draw(pipe, pictures[0], num_inference_steps=5, generator=seed(1)), first)


def test_output_types(pipe, pictures):
    images = pipe(pictures[0], num_inference_steps=1, generator=seed()).images
    assert isinstance(images[0], Image.Image) and images[0].size == (32, 32)
    array = draw(pipe, pictures[0], num_inference_steps=1, generator=seed())
    tensor = draw(pipe, pictures[0], num_inference_steps=1, generator=seed(), output_type="pt")
    latent = draw(pipe, pictures[0], num_inference_steps=1, generator=seed(), output_type="latent")
    assert array.shape == (1, 32, 32, 3) and tensor.shape == (1, 3, 32, 32) and latent.shape == (1, 4, 8, 8)
    assert np.array_equal(array[0].transpose(2, 0, 1), tensor[0].numpy())
    assert np.array_equal(pipe.decode_latents(latent, "np"), array)
    assert np.array_equal(np.asarray(images[0]), (array[0] * 255).round().astype(np.uint8))


def test_several_pictures_of_each_image_and_other_sizes(pipe, pictures):
    several = draw(pipe, pictures[:2], num_images_per_prompt=2, height=24, width=40, generator=seed())
    assert several.shape == (4, 24, 40, 3)
    assert not np.array_equal(several[0], several[1])


def test_a_negative_prompt_changes_the_picture(pipe, pictures):
    plain = draw(pipe, pictures[0], generator=seed(), guidance_scale=5.0)
    steered = draw(pipe, pictures[0], generator=seed(), guidance_scale=5.0, negative_prompt="a large dog")
    assert not np.array_equal(plain, steered)
    empty = draw(pipe, pictures[0], generator=seed(), guidance_scale=5.0, negative_prompt="")
    assert np.array_equal(plain, empty)


def test_callbacks_see_and_change_each_step(pipe, pictures):
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append((step, int(timestep), sorted(tensors)))
        return {"latents": tensors["latents"] * 0}

    latents = draw(pipe, pictures[0], output_type="latent", callback_on_step_end=callback)
    assert [step for step, _, _ in seen] == [0, 1, 2] and seen[0][1] > seen[-1][1]
    assert seen[0][2] == ["latents"]
    assert not latents.any()


def test_mixing_keeps_the_first_of_each(pipe, pictures):
    z = pipe.encode_image(pictures[:2])
    mixed = pipe.mix_caption_embeds([z[0], z[1]], [5, 3])
    assert torch.equal(mixed, torch.cat([z[0, :5], z[1, :3]])[None])
    assert draw(pipe, caption_embeds=mixed).shape == (1, 32, 32, 3)
    for lengths, words in (
        ([9, 1], "cannot keep 9"),
        ([8, 5], "sum to 13"),
        ([0, 0], "sum to 0"),
        ([3], "one length each"),
    ):
        with pytest.raises(ValueError, match=words):
            pipe.mix_caption_embeds([z[0], torch.cat([z[1], z[1]])[:8]], lengths)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "either image or caption_embeds"),
        ({"height": 30}, "divisible by 4"),
        ({"generator": [seed(), seed()]}, "2 generators for 1 pictures"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 pictures"),
        ({"negative_prompt": ("a", "b", "c")}, "3 negative prompts for 1 pictures"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"output_type": "jpeg"}, "output_type is 'jpeg'; expected 'pil', 'np', 'pt' or 'latent'"),
        ({"latents": torch.zeros(1, 4, 2, 2)}, "latents must be"),
        ({"callback_on_step_end_tensor_inputs": ["dreams"]}, "dreams"),
    ],
)
def test_what_is_wrong_is_said(pipe, pictures, settings, words):
    image = pictures[0] if settings else None
    with pytest.raises(ValueError, match=words):
        draw(pipe, image, **settings)


def test_an_image_and_embeddings_together_are_refused(pipe, pictures):
    with pytest.raises(ValueError, match="not both"):
        draw(pipe, pictures[0], caption_embeds=pipe.encode_image(pictures[0]))
