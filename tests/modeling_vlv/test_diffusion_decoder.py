"""The diffusion decoder computes diffusers' own losses, and no training changes it."""

import json

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler
from torch.nn import functional as F

from vlv.diffusion_decoder import DiffusionDecoder, StableDiffusionDecoder, load_diffusion_decoder

from ..builders import TEXT_WIDTH, assert_close_to_scale, stable_diffusion_parts


def build(prediction_type: str = "epsilon", timestep_sampling: str = "uniform", **scheduler) -> StableDiffusionDecoder:
    parts = stable_diffusion_parts(prediction_type, **scheduler)
    return StableDiffusionDecoder(parts["vae"], parts["unet"], parts["scheduler"].config, timestep_sampling)


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "latents": torch.randn(3, 4, 8, 8, generator=generator),
        "conditioning": torch.randn(3, 8, TEXT_WIDTH, generator=generator),
        "noise": torch.randn(3, 4, 8, 8, generator=generator),
        "timesteps": torch.tensor([0, 500, 999]),
    }


@pytest.mark.slow
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_loss_by_the_formulas(prediction_type, zero_snr, inputs):
    decoder = build(prediction_type, rescale_betas_zero_snr=zero_snr)
    kept = decoder.scheduler.alphas_cumprod[inputs["timesteps"]].view(3, 1, 1, 1)
    if zero_snr:
        assert kept[-1] == 0  # no signal is left at the last timestep
    noisy = kept.sqrt() * inputs["latents"] + (1 - kept).sqrt() * inputs["noise"]
    target = {
        "epsilon": inputs["noise"],
        "v_prediction": kept.sqrt() * inputs["noise"] - (1 - kept).sqrt() * inputs["latents"],
        "sample": inputs["latents"],
    }[prediction_type]
    predicted = decoder.unet(noisy, inputs["timesteps"], inputs["conditioning"]).sample
    assert_close_to_scale(decoder.denoising_loss(**inputs), F.mse_loss(predicted, target))


@pytest.mark.parametrize("scheduler", [DDPMScheduler, EulerDiscreteScheduler, PNDMScheduler])
def test_any_schedulers_config_gives_the_same_noise(scheduler, inputs):
    config = scheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).config
    parts = stable_diffusion_parts()
    decoder = StableDiffusionDecoder(parts["vae"], parts["unet"], config)
    assert_close_to_scale(decoder.denoising_loss(**inputs), build().denoising_loss(**inputs))


def test_the_noise_of_a_seed_does_not_depend_on_the_layout_of_memory(inputs):
    decoder = build()
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        latents = inputs["latents"].contiguous(memory_format=layout)
        torch.manual_seed(4)
        losses = decoder.denoise(latents, inputs["conditioning"], timesteps=inputs["timesteps"]).losses
        encoded = decoder.encode_images(pixels.contiguous(memory_format=layout), torch.Generator().manual_seed(3))
        found.append((losses, encoded))
    torch.manual_seed(4)
    noise = torch.randn(3, 4, 8, 8)
    assert_close_to_scale(found[0][0], decoder.denoise(**inputs | {"noise": noise}).losses)
    for contiguous, channels_last in zip(*found, strict=True):
        assert_close_to_scale(channels_last, contiguous)


def test_latents_are_scaled_samples_of_the_posterior():
    decoder = build()
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = decoder.encode_images(pixels, torch.Generator().manual_seed(3))
    posterior = decoder.vae.encode(pixels).latent_dist
    expected = posterior.sample(torch.Generator().manual_seed(3)) * 0.18215
    assert_close_to_scale(latents, expected)
    with pytest.raises(ValueError, match="divisible by 4"):
        decoder.encode_images(pixels[..., :30])


def test_only_the_conditioning_receives_gradients(inputs):
    decoder = build()
    inputs["conditioning"].requires_grad_(True)
    decoder.train()
    decoder.denoising_loss(**inputs).backward()
    assert inputs["conditioning"].grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in decoder.parameters())
    assert not any(module.training for module in decoder.modules())


def test_timesteps_are_uniform_or_stratified_and_start_at_the_minimum():
    decoder = build()
    uniform = torch.cat([decoder.sample_timesteps(64) for _ in range(40)])
    assert 0 <= uniform.min() < 20 and 980 <= uniform.max() <= 999
    assert abs(uniform.float().mean() - 499.5) < 30
    stratified = build(timestep_sampling="stratified").sample_timesteps(10)
    assert (stratified // 100).tolist() == list(range(10))
    late = stable_diffusion_parts()
    for sampling in ("uniform", "stratified"):
        decoder = StableDiffusionDecoder(
            late["vae"], late["unet"], late["scheduler"].config, sampling, min_timestep=600
        )
        timesteps = torch.cat([decoder.sample_timesteps(8) for _ in range(40)])
        assert 600 <= timesteps.min() < 650 and 950 < timesteps.max() <= 999
    with pytest.raises(ValueError, match="min_timestep is 1000"):
        StableDiffusionDecoder(late["vae"], late["unet"], late["scheduler"].config, min_timestep=1000)


def test_loads_a_diffusers_folder(stable_diffusion, inputs):
    decoder = load_diffusion_decoder(str(stable_diffusion))
    assert isinstance(decoder, DiffusionDecoder)
    assert decoder.image_size == 32
    assert_close_to_scale(decoder.denoising_loss(**inputs), build().denoising_loss(**inputs))


def test_diffusion_models_of_other_families_are_errors(tmp_path, stable_diffusion):
    parts = stable_diffusion_parts()
    with pytest.raises(ValueError, match="flow-matching"):
        StableDiffusionDecoder(parts["vae"], parts["unet"], FlowMatchEulerDiscreteScheduler().config)
    with pytest.raises(ValueError, match="prediction_type is 'dreams'"):
        build("epsilon").__class__(
            parts["vae"], parts["unet"], {**parts["scheduler"].config, "prediction_type": "dreams"}
        )
    index = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"is a StableDiffusion3Pipeline of transformer; expected .*Diffusion XL"):
        load_diffusion_decoder(str(tmp_path))
    with pytest.raises(OSError):
        load_diffusion_decoder(str(tmp_path / "nothing"))
