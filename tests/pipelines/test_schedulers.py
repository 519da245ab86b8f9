"""Schedulers by name: each keeps the noise levels of the model's own one, or is refused with those that fit."""

import inspect
import logging

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from vlv.pipelines.schedulers import BETA_SCHEDULERS, FLOW_SCHEDULERS, OWN, SCHEDULERS, build_scheduler

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0)
BETA = DDPMScheduler(**BETAS, steps_offset=1)


@torch.no_grad()
def samples_of(scheduler, is_flow: bool, steps: int = 40) -> torch.Tensor:
    """4,096 samples by a denoiser that knows the data's distribution, a normal one of mean 2 and deviation 0.5."""
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(4096, 1, 1, 1, generator=generator) * getattr(scheduler, "init_noise_sigma", 1.0)
    settings = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for timestep in scheduler.timesteps:
        noisy = samples if is_flow else scheduler.scale_model_input(samples, timestep)
        if is_flow:
            signal, spread = 1 - timestep / 1000, timestep / 1000
        else:
            kept = BETA.alphas_cumprod[min(round(float(timestep)), 999)]
            signal, spread = kept**0.5, (1 - kept) ** 0.5
        variance = (signal * 0.5) ** 2 + spread**2
        clean = 2.0 + signal * 0.25 / variance * (noisy - signal * 2.0)  # the expected image of these noised ones
        noise = (noisy - signal * clean) / spread
        predicted = noise - clean if is_flow else noise
        samples = scheduler.step(predicted, timestep, samples, **settings).prev_sample
    return samples


@pytest.mark.parametrize(
    ("name", "own"),
    [*((name, BETA) for name in BETA_SCHEDULERS), *((name, FLOW) for name in FLOW_SCHEDULERS)],
)
def test_each_scheduler_samples_the_distribution_that_the_denoiser_knows(name, own):
    samples = samples_of(build_scheduler(name, own), own is FLOW)
    assert samples.mean().item() == pytest.approx(2.0, abs=0.1)  # the highest timestep of BETA has 7% of the signal
    assert samples.std().item() == pytest.approx(0.5, abs=0.06)


def test_noise_levels_prediction_and_spacing_are_those_of_the_models_scheduler():
    own = DDIMScheduler(**BETAS, **ZERO_SNR)
    for name in ("ddpm", "ddim", "dpm++", "dpm++-sde", "unipc", "euler", "euler-a"):
        built = build_scheduler(name, own)
        assert (built.config.prediction_type, built.config.rescale_betas_zero_snr) == ("v_prediction", True)
        built.set_timesteps(5)
        assert [round(float(timestep)) for timestep in built.timesteps] == [999, 799, 599, 399, 199]
    assert build_scheduler("dpm++", build_scheduler("dpm++-sde", own)).config.algorithm_type == "dpmsolver++"
    back = build_scheduler("ddpm", build_scheduler("euler", own))
    assert back.config.clip_sample is False and torch.equal(
        back.alphas_cumprod, DDPMScheduler(**BETAS, **ZERO_SNR).alphas_cumprod
    )


def test_a_flow_matching_model_keeps_its_shift(caplog):
    with caplog.at_level(logging.WARNING):
        solver = build_scheduler("dpm++", FLOW)
        back = build_scheduler("euler", solver)
    assert solver.config.flow_shift == back.config.shift == 3.0
    assert not caplog.records


def test_own_is_the_models_scheduler_itself():
    assert build_scheduler(OWN, BETA) is BETA and SCHEDULERS[-1] == OWN


@pytest.mark.parametrize(
    ("name", "own", "message"),
    [
        ("dpm", BETA, r"'dpm' is not known; expected one of ddpm, ddim, .*, heun, own$"),
        (
            "ddpm",
            FLOW,
            r"'ddpm' does not fit .* FlowMatchEulerDiscreteScheduler; .* dpm\+\+, unipc, euler, heun, own$",
        ),
        ("heun", DDIMScheduler(**BETAS, **ZERO_SNR), r"'heun' does not fit .*; .* unipc, euler, euler-a, own$"),
        ("dpm++", EDMEulerScheduler(), r"'dpm\+\+' does not fit .* EDMEulerScheduler; expected one of own$"),
        ("euler-a", DDPMScheduler(**BETAS, prediction_type="sample"), r"'euler-a' does not fit .* euler, heun, own$"),
    ],
)
def test_a_scheduler_that_does_not_fit_is_an_error_that_lists_those_that_do(name, own, message):
    with pytest.raises(ValueError, match=message):
        build_scheduler(name, own)
