"""Training timesteps of a diffusion model, and the weights of their losses."""

import torch

TIMESTEP_SAMPLINGS = ("uniform", "stratified", "logit_normal")


def stratified_timesteps(
    batch_size: int, first: int, last: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """One random timestep from each of `batch_size` equal parts of the range `first` to `last`, both included.

    A batch then covers the complete range: the expectation is that of independent uniform timesteps, the variance is
    lower.

    Returns:
        `(B,)`, int64, on the CPU, in ascending order.
    """
    strata = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size  # (B,) in 0..1
    return (first + strata * (last + 1 - first)).long().clamp(max=last)


def logit_normal_timesteps(
    batch_size: int, first: int, last: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Random timesteps from `first` to `last`, both included, mostly from the middle of that range.

    The place in the range is the sigmoid of a standard normal number (Esser et al., 2024, arXiv 2403.03206, sec. 3.1).

    Returns:
        `(B,)`, int64, on the CPU.
    """
    places = torch.randn(batch_size, generator=generator).sigmoid()  # (B,) in 0..1
    return (first + places * (last + 1 - first)).long().clamp(max=last)


def min_snr_weights(snr: torch.Tensor, gamma: float, prediction_type: str) -> torch.Tensor:
    """The weights of Min-SNR for the squared error of a prediction (Hang et al., 2023, arXiv 2303.09556, sec. 3.4).

    They are `min(snr, gamma)` for a prediction of the image, that divided by `snr` for one of the noise, and that
    divided by `snr + 1` for one of the velocity.

    Args:
        snr: Signal-to-noise ratios, 0 or above, of any shape.
        gamma: Above 0; the paper has 5.
        prediction_type: `"sample"`, `"epsilon"` or `"v_prediction"`.

    Returns:
        The shape of `snr`. The weight of a noise prediction is 1 where `snr` is 0, the limit.
    """
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)
    weights = snr.clamp(max=gamma)
    return weights / (snr + 1) if prediction_type == "v_prediction" else weights
