"""Schedulers of diffusers by short names, made from the configuration of a model's own scheduler."""

import inspect
from collections.abc import Mapping
from typing import Any

# Name, class in diffusers, and the settings that distinguish it from others of the same class.
BETA_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "use_flow_sigmas": False}),
    "dpm++-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_flow_sigmas": False}),
    "unipc": ("UniPCMultistepScheduler", {"use_flow_sigmas": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
}
"""Of models with a beta schedule: Stable Diffusion 1, 2 and XL."""
FLOW_SETTINGS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
FLOW_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": False}),
    "heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", FLOW_SETTINGS | {"algorithm_type": "dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", FLOW_SETTINGS),
}
"""Of models that are trained by flow matching: Stable Diffusion 3 and 3.5."""
OWN = "own"  # the model's scheduler as it is
SCHEDULERS = (*dict.fromkeys([*BETA_SCHEDULERS, *FLOW_SCHEDULERS]), OWN)
"""All names."""
DEFAULT_SCHEDULER = "dpm++"
"""Of `vlv reconstruct`; docs/schedulers.md has the measurement."""
DEFAULT_STEPS = {"dpm++": 15, "unipc": 15}
"""Denoising steps of solvers of the second order; others take `MANY_STEPS`."""
MANY_STEPS = 50


def build_scheduler(name: str, own: Any) -> Any:
    """A scheduler with the noise levels, the kind of prediction and the spacing of timesteps of another one.

    Args:
        name: One of `SCHEDULERS`.
        own: The scheduler that the model comes with.

    Raises:
        ValueError: If there is no such name, or the scheduler does not fit the model; the message lists those that do.
    """
    if name == OWN:
        return own
    config = own.config
    scheduler = _build(name, config)
    if scheduler is None:
        fitting = ", ".join(other for other in SCHEDULERS if other == OWN or _build(other, config) is not None)
        comes_with = type(own).__name__
        reason = "is not known" if name not in SCHEDULERS else f"does not fit a model that comes with a {comes_with}"
        raise ValueError(f"the scheduler {name!r} {reason}; expected one of {fitting}")
    return scheduler


def _build(name: str, config: Mapping[str, Any]) -> Any:
    """The scheduler; None if it does not fit."""
    import diffusers  # when used: this module's names alone load no library

    is_flow = "shift" in config or config.get("use_flow_sigmas")
    if name not in (table := FLOW_SCHEDULERS if is_flow else BETA_SCHEDULERS):
        return None
    class_name, settings = table[name]
    scheduler_class = getattr(diffusers, class_name)
    accepted = inspect.signature(scheduler_class.__init__).parameters
    if is_flow:  # diffusers converts beta schedules alone
        shift = config.get("shift", config.get("flow_shift"))
        settings = {**config, **settings, "shift": shift, "flow_shift": shift}
        scheduler = scheduler_class(**{key: value for key, value in settings.items() if key in accepted})
    elif "beta_schedule" not in config and config.get("trained_betas") is None:
        return None  # its noise levels are no beta schedule, as those of EDM
    elif config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in accepted:
        return None  # its noise levels would be others than those of the training
    else:
        scheduler = scheduler_class.from_config(dict(config), **settings)
    return scheduler if _steps(scheduler) else None


def _steps(scheduler: Any) -> bool:
    """Whether the scheduler can step; not every one takes every kind of prediction."""
    import torch

    trial = type(scheduler).from_config(scheduler.config)
    trial.set_timesteps(2)
    zeros, timestep = torch.zeros(1, 1, 1, 1), trial.timesteps[0]
    try:
        if hasattr(trial, "scale_model_input"):  # not in those of flow matching
            trial.scale_model_input(zeros, timestep)
        trial.step(zeros, timestep, zeros)
    except (NotImplementedError, ValueError):
        return False
    return True
