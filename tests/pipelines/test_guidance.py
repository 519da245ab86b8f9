"""Guidance: both halves in one batch, in an interval of the steps, and the negative prompt encoded once."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler

from ..builders import POSITIONS, QUERIES, assert_close_to_scale
from .test_reconstruction import count_unet_rows, denoise_by_hand, embeddings, seed, use

STEPS = {"num_inference_steps": 4, "output_type": "latent"}


@pytest.mark.parametrize("tokens", [3, QUERIES, POSITIONS])
def test_one_batch_of_both_halves_equals_separate_passes_whatever_their_lengths(reconstruction, images, tokens):
    prompt_embeds, negative = embeddings(reconstruction, images[:2], tokens)
    latents, timestep = torch.randn(2, 4, 8, 8, generator=seed()), torch.tensor(500)
    for shorter, longer in ((prompt_embeds, negative), (negative, prompt_embeds)):
        reconstruction._guidance_scale, reconstruction._guidance_rescale = 50.0, 0.0
        calls = count_unet_rows(reconstruction)
        with torch.no_grad():
            together = reconstruction.predict_noise(latents, timestep, shorter, longer)
            assert calls == [4]
            apart = [reconstruction.unet(latents, timestep, embeds).sample for embeds in (longer, shorter)]
        assert_close_to_scale(together, apart[0] + 50.0 * (apart[1] - apart[0]))


@pytest.mark.parametrize(
    ("interval", "scales"),
    [((0.0, 1.0), [50.0] * 4), ((0.25, 0.75), [1.0, 50.0, 50.0, 1.0]), ((0.0, 0.3), [50.0, 50.0, 1.0, 1.0])],
)
def test_steps_outside_the_interval_compute_one_half_without_guidance(reconstruction, images, interval, scales):
    use(reconstruction, DDIMScheduler)
    latents = torch.randn(2, 4, 8, 8, generator=seed())
    expected = denoise_by_hand(reconstruction, latents, *embeddings(reconstruction, images[:2], QUERIES), scales)
    calls = count_unet_rows(reconstruction)
    settings = {"latents": latents, "guidance_scale": 50.0, "guidance_interval": interval, **STEPS}
    got = reconstruction(images[:2], **settings).images
    assert_close_to_scale(got, expected, 1e-4)
    assert calls == [2 if scale == 1 else 4 for scale in scales]


@pytest.mark.parametrize("interval", [(0.5, 0.5), (0.7, 0.2), (-0.1, 1.0), (0.0, 1.5), (0.0, float("nan"))])
def test_an_interval_that_is_empty_or_outside_the_schedule_is_an_error(reconstruction, images, interval):
    with pytest.raises(ValueError, match="guidance_interval must be two ascending numbers"):
        reconstruction(images[0], guidance_interval=interval)


@pytest.mark.parametrize("interval", [(0.3, 0.45), (0.8, 1.0)])
def test_an_interval_without_a_step_is_an_error(reconstruction, images, interval):
    with pytest.raises(ValueError, match=r"guidance_interval .* contains none of 4 steps"):
        reconstruction(images[0], guidance_interval=interval, num_inference_steps=4)
    with pytest.raises(ValueError, match=r"guidance_interval .* contains none of 2 steps"):
        reconstruction(images[0], guidance_interval=(0.6, 1.0), timesteps=[500, 200])


def test_both_evaluations_of_a_step_are_guided_or_neither(reconstruction, images):
    use(reconstruction, HeunDiscreteScheduler)
    calls = count_unet_rows(reconstruction)
    reconstruction(images[0], guidance_scale=5.0, guidance_interval=(0.25, 0.75), **STEPS)
    assert calls == [1, 1, 2, 2, 2, 2, 1]  # the last step has one evaluation


def test_the_negative_prompt_is_encoded_once_where_it_is_kept(reconstruction, images):
    calls: list[int] = []
    table = reconstruction.encoder.text_encoder.get_input_embeddings()
    table.register_forward_hook(lambda *_: calls.append(1))  # of words alone

    def count_calls(**settings) -> int:
        calls.clear()
        reconstruction(images[0], **{**STEPS, "num_inference_steps": 1}, **settings)
        return len(calls)

    reconstruction.keep_prompt()
    assert [count_calls(), count_calls(), count_calls()] == [1, 0, 0]
    assert [count_calls(negative_prompt="a dog"), count_calls(negative_prompt="a dog"), count_calls()] == [1, 0, 1]
    with torch.autocast("cpu", torch.bfloat16):
        assert [count_calls(), count_calls()] == [1, 0]
    reconstruction.keep_prompt()
    assert [count_calls(), count_calls()] == [1, 0]
    reconstruction.keep_prompt(False)
    assert [count_calls(), count_calls()] == [1, 1]


def test_the_negative_prompt_is_that_of_the_text_encoder_however_it_was_changed(reconstruction):
    first = reconstruction.encode_prompt("")
    text_encoder = reconstruction.encoder.text_encoder
    text_encoder.get_input_embeddings().weight.data.mul_(3.0)  # no version of the parameter counts this
    changed = reconstruction.encode_prompt("")
    assert not torch.allclose(changed, first, atol=1e-3)
    other = copy.deepcopy(text_encoder)
    for parameter in other.parameters():
        parameter.data.mul_(0.5)
    reconstruction.encoder.text_encoder = other
    assert not torch.allclose(reconstruction.encode_prompt(""), changed, atol=1e-3)


def test_changed_embeddings_of_a_prompt_do_not_change_the_kept_ones(reconstruction):
    reconstruction.keep_prompt()
    first = reconstruction.encode_prompt("")
    kept = first.clone()
    first.zero_()
    assert torch.equal(reconstruction.encode_prompt(""), kept) and kept.any()
    shorter = reconstruction.encode_prompt("", max_length=5)
    assert_close_to_scale(shorter, kept[:, :5])
