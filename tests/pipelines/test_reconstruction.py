"""The reconstruction pipeline is reproducible with any scheduler, and has the arguments and callbacks of diffusers."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback, SDCFGCutoffCallback
from PIL import Image

from vlv import VLVImageProcessor
from vlv.checkpoints import MINIATURE

from ..builders import POSITIONS, QUERIES, TEXT_WIDTH, assert_close_to_scale


@pytest.fixture
def pipe(reconstruction):
    return reconstruction


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def generate(pipe, *arguments, **settings):
    return pipe(*arguments, **{"num_inference_steps": 3, "output_type": "np", **settings}).images


def use(pipe, scheduler, **settings) -> None:
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **settings)


def test_same_seed_same_image_another_seed_another(pipe, images):
    first = generate(pipe, images[0], generator=seed(1))
    assert np.array_equal(generate(pipe, images[0], generator=seed(1)), first)
    assert not np.array_equal(generate(pipe, images[0], generator=seed(2)), first)
    assert not np.array_equal(generate(pipe, images[1], generator=seed(1)), first)


def test_with_a_generator_each_an_image_does_not_depend_on_its_batch(pipe, images):
    together = generate(pipe, images[:3], generator=[seed(i) for i in range(3)])
    for i in range(3):
        assert_close_to_scale(
            torch.as_tensor(generate(pipe, images[i], generator=seed(i))[0]), torch.as_tensor(together[i]), 1e-4
        )


def test_an_image_and_its_embeddings_give_the_same_reconstruction(pipe, images):
    z = pipe.get_caption_embeds(images[:2])
    assert z.shape == (2, QUERIES, TEXT_WIDTH)
    from_embeds = generate(pipe, caption_embeds=z, generator=seed())
    assert np.array_equal(from_embeds, generate(pipe, images[:2], generator=seed()))


def test_one_step_equals_the_formula_of_guidance(pipe, images):
    """Guidance 2 as in the authors' code: the unconditional prediction plus twice the difference."""
    latents = torch.randn(1, 4, 8, 8, generator=seed())
    got = pipe(images[0], latents=latents, num_inference_steps=1, output_type="latent", generator=seed(5)).images
    prompt_embeds = pipe.encoder.encode_caption_embeds(pipe.get_caption_embeds(images[0]))
    ids = pipe.tokenizer("", padding="max_length", max_length=POSITIONS, return_tensors="pt").input_ids
    negative_prompt_embeds = pipe.encoder.text_encoder(ids).last_hidden_state
    pipe.scheduler.set_timesteps(1)
    t = pipe.scheduler.timesteps[0]
    with torch.no_grad():
        noise_pred_uncond = pipe.unet(latents, t, negative_prompt_embeds).sample
        noise_pred_text = pipe.unet(latents, t, prompt_embeds).sample
        noise_pred = noise_pred_uncond + 2.0 * (noise_pred_text - noise_pred_uncond)
    expected = pipe.scheduler.step(noise_pred, t, latents, generator=seed(5)).prev_sample
    assert_close_to_scale(got, expected)


def test_without_guidance_there_is_no_unconditional_pass(pipe, images):
    calls = count_unet_rows(pipe)
    generate(pipe, images[0], guidance_scale=1.0)
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
def test_any_scheduler_works(pipe, images, scheduler):
    use(pipe, scheduler)
    first = generate(pipe, images[0], num_inference_steps=5, generator=seed(1))
    assert np.isfinite(first).all()
    assert np.array_equal(generate(pipe, images[0], num_inference_steps=5, generator=seed(1)), first)


def test_output_types(pipe, images):
    pil = pipe(images[0], num_inference_steps=1, generator=seed()).images
    assert isinstance(pil[0], Image.Image) and pil[0].size == (32, 32)
    array = generate(pipe, images[0], num_inference_steps=1, generator=seed())
    tensor = generate(pipe, images[0], num_inference_steps=1, generator=seed(), output_type="pt")
    latent = generate(pipe, images[0], num_inference_steps=1, generator=seed(), output_type="latent")
    assert array.shape == (1, 32, 32, 3) and tensor.shape == (1, 3, 32, 32) and latent.shape == (1, 4, 8, 8)
    assert np.array_equal(array[0].transpose(2, 0, 1), tensor[0].numpy())
    assert np.array_equal(pipe.decode_latents(latent, "np"), array)
    assert np.array_equal(np.asarray(pil[0]), (array[0] * 255).round().astype(np.uint8))
    assert isinstance(pipe(images[0], num_inference_steps=1, return_dict=False), tuple)


def test_several_reconstructions_of_each_image_and_other_sizes(pipe, images):
    several = generate(pipe, images[:2], num_images_per_prompt=2, height=24, width=40, generator=seed())
    assert several.shape == (4, 24, 40, 3)
    assert not np.array_equal(several[0], several[1])


def test_the_default_size_is_the_crop_s_or_else_the_unet_s(pipe):
    assert pipe.default_size == 32
    for crop, expected in ((48, 48), (50, 32)):  # the autoencoder cannot decode 50
        pipe.register_modules(image_processor=VLVImageProcessor(pre_crop_size=crop))
        assert pipe.default_size == expected


def test_a_negative_prompt_changes_the_image(pipe, images):
    plain = generate(pipe, images[0], generator=seed(), guidance_scale=5.0)
    steered = generate(pipe, images[0], generator=seed(), guidance_scale=5.0, negative_prompt="a large dog")
    assert not np.array_equal(plain, steered)
    empty = generate(pipe, images[0], generator=seed(), guidance_scale=5.0, negative_prompt="")
    assert np.array_equal(plain, empty)


def test_guidance_rescale_moves_the_standard_deviation_to_that_of_the_text_prediction(pipe, images):
    prompt_embeds, negative_prompt_embeds = embeddings(pipe, images[:2], QUERIES)
    latents = torch.randn(2, 4, 8, 8, generator=seed())
    t = torch.tensor(500)
    predictions = {}
    for scale, rescale in ((1.0, 0.0), (4.0, 0.0), (4.0, 0.5), (4.0, 1.0)):
        pipe._guidance_scale, pipe._guidance_rescale = scale, rescale
        with torch.no_grad():
            predictions[scale, rescale] = pipe.predict_noise(latents, t, prompt_embeds, negative_prompt_embeds)
    std = {settings: value.std(dim=(1, 2, 3)) for settings, value in predictions.items()}
    assert (std[4.0, 0.0] / std[1.0, 0.0] - 1).abs().min() > 1e-3  # or nothing below could fail
    assert_close_to_scale(std[4.0, 1.0], std[1.0, 0.0])
    assert_close_to_scale(predictions[4.0, 0.5], (predictions[4.0, 0.0] + predictions[4.0, 1.0]) / 2)


# --- timesteps and sigmas -------------------------------------------------------------------------------------------


def test_custom_timesteps_replace_the_number_of_steps(pipe, images):
    seen = []

    def callback(pipeline, step, timestep, callback_kwargs):
        seen.append((step, int(timestep), pipeline.num_timesteps))

    generate(pipe, images[0], timesteps=[900, 500, 10, 0], callback_on_step_end=callback)
    assert seen == [(0, 900, 4), (1, 500, 4), (2, 10, 4), (3, 0, 4)]
    generate(pipe, images[0])
    assert pipe.num_timesteps == 3


def test_custom_sigmas_replace_the_number_of_steps(pipe, images):
    use(pipe, EulerDiscreteScheduler)
    sigmas = [10.0, 3.0, 1.0, 0.5, 0.0]  # this scheduler takes the last one, too
    generate(pipe, images[0], sigmas=sigmas)
    assert pipe.num_timesteps == 4
    assert pipe.scheduler.sigmas.tolist() == sigmas


@pytest.mark.parametrize(
    ("scheduler", "settings", "timesteps"),
    [(HeunDiscreteScheduler, {}, 5), (PNDMScheduler, {"skip_prk_steps": True}, 4), (DDIMScheduler, {}, 3)],
)
def test_the_progress_bar_counts_steps_and_not_evaluations(pipe, images, scheduler, settings, timesteps, monkeypatch):
    use(pipe, scheduler, **settings)
    bars = []
    original = pipe.progress_bar

    def progress_bar(*arguments, **settings):
        bars.append(original(*arguments, **settings))
        return bars[-1]

    pipe.set_progress_bar_config()
    monkeypatch.setattr(pipe, "progress_bar", progress_bar)
    generate(pipe, images[0])
    assert pipe.num_timesteps == timesteps
    assert (bars[0].total, bars[0].n) == (3, 3)


# --- callbacks ------------------------------------------------------------------------------------------------------


def count_unet_rows(pipe) -> list[int]:
    """Fills with the batch size of each call of the denoiser."""
    calls: list[int] = []
    pipe.unet.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    return calls


def embeddings(pipe, images, tokens: int, copies: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt embeddings and negative prompt embeddings of images with `tokens` caption embeddings."""
    z = pipe.get_caption_embeds(images)
    z = torch.cat([z, z], dim=1)[:, :tokens]
    prompt_embeds = pipe.encode_caption_embeds(z).repeat_interleave(copies, dim=0)
    return prompt_embeds, pipe.encode_prompt("").expand(len(prompt_embeds), -1, -1)


@torch.no_grad()
def denoise_by_hand(pipe, latents, prompt_embeds, negative_prompt_embeds, scales: list[float]) -> torch.Tensor:
    """One guidance scale for each step; 1 is the prediction without guidance."""
    pipe.scheduler.set_timesteps(len(scales))
    for t, scale in zip(pipe.scheduler.timesteps, scales, strict=True):
        noise_pred_text = pipe.unet(latents, t, prompt_embeds).sample
        noise_pred_uncond = pipe.unet(latents, t, negative_prompt_embeds).sample
        noise_pred = noise_pred_uncond + scale * (noise_pred_text - noise_pred_uncond)
        latents = pipe.scheduler.step(noise_pred if scale != 1 else noise_pred_text, t, latents).prev_sample
    return latents


class EndGuidanceAsDocumented(PipelineCallback):
    """diffusers' documentation, "Dynamic classifier-free guidance": keeps the second half of the embeddings."""

    tensor_inputs = ["prompt_embeds"]  # noqa: RUF012

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        if step_index == int(pipeline.num_timesteps * 0.25):
            callback_kwargs["prompt_embeds"] = callback_kwargs["prompt_embeds"].chunk(2)[-1]
            pipeline._guidance_scale = 0.0
        return callback_kwargs


CUTOFFS = {
    "ratio": SDCFGCutoffCallback(cutoff_step_ratio=0.25),
    "index": SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1),
    "several": MultiPipelineCallbacks([SDCFGCutoffCallback(cutoff_step_ratio=0.25)] * 2),
    "documented": EndGuidanceAsDocumented(),
}


# With fewer caption embeddings than text positions, the two halves of the batch have different lengths.
@pytest.mark.parametrize(("image_count", "copies", "tokens"), [(1, 1, POSITIONS), (3, 1, POSITIONS), (2, 2, QUERIES)])
@pytest.mark.parametrize("callback", CUTOFFS)
def test_after_a_guidance_cutoff_each_image_is_denoised_without_guidance(
    pipe, images, callback, image_count, copies, tokens
):
    use(pipe, DDIMScheduler)
    z = pipe.get_caption_embeds(images[:image_count])
    prompt_embeds, negative_prompt_embeds = embeddings(pipe, images[:image_count], tokens, copies)
    count = image_count * copies
    latents = torch.randn(count, 4, 8, 8, generator=seed())
    scales = [50.0, 50.0, 1.0, 1.0]  # high, because an untrained denoiser hardly follows its prompt
    expected = denoise_by_hand(pipe, latents, prompt_embeds, negative_prompt_embeds, scales)
    calls = count_unet_rows(pipe)
    got = pipe(
        caption_embeds=torch.cat([z, z], dim=1)[:, :tokens],
        num_images_per_prompt=copies,
        latents=latents,
        num_inference_steps=4,
        guidance_scale=50.0,
        output_type="latent",
        callback_on_step_end=CUTOFFS[callback],
    ).images
    assert_close_to_scale(got, expected, 1e-4)
    assert calls == [2 * count] * 2 + [count] * 2
    uncut = denoise_by_hand(pipe, latents, prompt_embeds, negative_prompt_embeds, [50.0] * 4)
    assert (uncut - expected).abs().max() > 0.1  # or the comparison could not fail


def test_guidance_is_that_of_the_call_again_after_a_cutoff(pipe, images):
    plain = generate(pipe, images[0], generator=seed())
    generate(pipe, images[0], generator=seed(), callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.0))
    assert pipe.guidance_scale == 0.0 and not pipe.do_classifier_free_guidance
    assert np.array_equal(generate(pipe, images[0], generator=seed()), plain)
    assert pipe.guidance_scale == 2.0 and pipe.do_classifier_free_guidance


def test_an_interrupted_call_skips_the_remaining_steps(pipe, images):
    seen = []

    def stop_at_the_second(pipeline, step, timestep, callback_kwargs):
        seen.append(callback_kwargs["latents"])
        pipeline._interrupt = step == 1

    calls = count_unet_rows(pipe)
    settings = {"guidance_scale": 1.0, "num_inference_steps": 5, "output_type": "latent"}
    got = generate(pipe, images[0], callback_on_step_end=stop_at_the_second, **settings)
    assert len(seen) == len(calls) == 2 and pipe.interrupt
    assert torch.equal(got, seen[-1])
    generate(pipe, images[0], **settings)
    assert len(calls) == 2 + 5 and not pipe.interrupt


@pytest.mark.slow
def test_diffusers_callbacks_work_where_the_pipeline_is_loaded_as_remote_code():
    pipe = DiffusionPipeline.from_pretrained(str(MINIATURE), trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    image = Image.new("RGB", (64, 64), "pink")
    steps = []

    def stop(pipeline, step, timestep, callback_kwargs):
        steps.append(step)
        pipeline._interrupt = True
        return callback_kwargs

    pipe(image, num_inference_steps=6, callback_on_step_end=stop)
    assert steps == [0]
    calls = count_unet_rows(pipe)
    pipe([image, image], num_inference_steps=4, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.5))
    assert calls == [4, 4, 4, 2]  # three steps with guidance, one without


def test_callbacks_see_and_change_the_latents_of_each_step(pipe, images):
    seen = []

    def callback(pipeline, step, timestep, callback_kwargs):
        seen.append((step, int(timestep), sorted(callback_kwargs)))
        return {"latents": callback_kwargs["latents"] * 0}

    latents = generate(pipe, images[0], output_type="latent", callback_on_step_end=callback)
    assert [step for step, _, _ in seen] == [0, 1, 2] and seen[0][1] > seen[-1][1]
    assert seen[0][2] == ["latents"]
    assert not latents.any()


def test_callbacks_see_and_change_the_embeddings(pipe, images):
    """The embeddings of another image, and another negative prompt, from the second step on."""
    use(pipe, DDIMScheduler)
    prompt_embeds, negative_prompt_embeds = embeddings(pipe, images[:2], QUERIES)
    other, other_negative = prompt_embeds.flip(0), pipe.encode_prompt(["a large dog", "a small tree"])
    seen = []

    def swap(pipeline, step, timestep, callback_kwargs):
        seen.append(callback_kwargs)
        return {"prompt_embeds": other, "negative_prompt_embeds": other_negative} if step == 0 else None

    latents = torch.randn(2, 4, 8, 8, generator=seed())
    got = generate(
        pipe,
        images[:2],
        latents=latents,
        output_type="latent",
        callback_on_step_end=swap,
        callback_on_step_end_tensor_inputs=["prompt_embeds", "negative_prompt_embeds"],
    )
    assert_close_to_scale(seen[0]["prompt_embeds"], prompt_embeds)
    assert_close_to_scale(seen[0]["negative_prompt_embeds"], negative_prompt_embeds)
    assert seen[1]["prompt_embeds"] is other and seen[1]["negative_prompt_embeds"] is other_negative
    pipe.scheduler.set_timesteps(3)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            uncond = pipe.unet(latents, t, negative_prompt_embeds).sample
            text = pipe.unet(latents, t, prompt_embeds).sample
            latents = pipe.scheduler.step(uncond + 2.0 * (text - uncond), t, latents).prev_sample
            prompt_embeds, negative_prompt_embeds = other, other_negative
    assert_close_to_scale(got, latents, 1e-4)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_a_callback_that_returns_embeddings_for_other_images_is_an_error(pipe, images, rows):
    def callback(pipeline, step, timestep, callback_kwargs):
        return {"prompt_embeds": torch.ones(rows, QUERIES, TEXT_WIDTH)}

    with pytest.raises(ValueError, match=f"prompt_embeds of {rows} rows for 2 images"):
        generate(pipe, images[:2], callback_on_step_end=callback)


def test_a_callback_may_not_turn_guidance_on_without_negative_embeddings(pipe, images):
    def callback(pipeline, step, timestep, callback_kwargs):
        pipeline._guidance_scale = 3.0

    with pytest.raises(ValueError, match="no negative_prompt_embeds"):
        generate(pipe, images[0], guidance_scale=1.0, callback_on_step_end=callback)


# --- mixing and errors ----------------------------------------------------------------------------------------------


def test_mixing_keeps_the_leading_embeddings_of_each_image(pipe, images):
    z = pipe.get_caption_embeds(images[:2])
    mixed = pipe.mix_caption_embeds([z[0], z[1]], [5, 3])
    assert torch.equal(mixed, torch.cat([z[0, :5], z[1, :3]])[None])
    assert generate(pipe, caption_embeds=mixed).shape == (1, 32, 32, 3)
    for lengths, message in (
        ([9, 1], "cannot keep 9"),
        ([8, 5], "sum to 13"),
        ([0, 0], "sum to 0"),
        ([3], "one length each"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.mix_caption_embeds([z[0], torch.cat([z[1], z[1]])[:8]], lengths)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "either image or caption_embeds"),
        ({"height": 30}, "divisible by 4"),
        ({"generator": [seed(), seed()]}, "2 generators for 1 images"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 images"),
        ({"negative_prompt": ("a", "b", "c")}, "3 negative prompts for 1 images"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1, got 0"),
        ({"timesteps": []}, "timesteps is empty"),
        ({"timesteps": [500], "sigmas": [1.0]}, "either timesteps or sigmas, not both"),
        ({"sigmas": [1.0]}, "DDPMScheduler does not take custom sigmas"),
        ({"output_type": "jpeg"}, "output_type is 'jpeg'; expected 'pil', 'np', 'pt' or 'latent'"),
        ({"latents": torch.zeros(1, 4, 2, 2)}, "latents must be"),
        ({"callback_on_step_end_tensor_inputs": ["conditioning"]}, r"'prompt_embeds'.*not \['conditioning'\]"),
    ],
)
def test_errors_name_the_argument_and_what_is_expected(pipe, images, settings, message):
    image = images[0] if settings else None
    with pytest.raises(ValueError, match=message):
        generate(pipe, image, **settings)


def test_timesteps_are_refused_by_a_scheduler_that_does_not_take_them(pipe, images):
    use(pipe, DDIMScheduler)
    with pytest.raises(ValueError, match="DDIMScheduler does not take custom timesteps"):
        generate(pipe, images[0], timesteps=[500, 0])


def test_an_image_and_embeddings_together_are_refused(pipe, images):
    with pytest.raises(ValueError, match="not both"):
        generate(pipe, images[0], caption_embeds=pipe.get_caption_embeds(images[0]))
