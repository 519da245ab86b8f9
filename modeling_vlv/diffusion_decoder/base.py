"""The interface between VLV and the frozen text-to-image model that trains it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass
class DenoisingOutput:
    """The loss of a batch, and what it consists of.

    Attributes:
        loss: A float32 scalar with gradients.
        losses: `(B,)`, float32, without gradients: the error of each image, without a weight.
        timesteps: `(B,)`, int64: the timestep of each image, on the device of `losses`.
    """

    loss: torch.Tensor
    losses: torch.Tensor
    timesteps: torch.Tensor


class DiffusionDecoder(nn.Module, ABC):
    """A frozen latent diffusion model, as stage 1 uses it.

    Frozen means: no parameter requires a gradient, the module is always in evaluation mode, and no checkpoint contains
    it. Gradients pass through it to the conditioning. The subclass of each model family decides how noise is added and
    what the denoiser predicts (noise, velocity, flow). The trainer does not depend on either.
    """

    image_size: int
    """Height and width in pixels that the model was trained on."""
    num_timesteps: int
    """Number of timesteps of the complete schedule; timesteps are 0 to `num_timesteps - 1`."""

    @property
    @abstractmethod
    def timestep_range(self) -> tuple[int, int]:
        """The lowest and the highest training timestep."""

    def freeze(self) -> None:
        """Freezes all parameters. Subclasses call this at the end of `__init__`."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True):
        return super().train(False)

    @property
    @abstractmethod
    def denoiser(self) -> Any:
        """The denoiser, a model of diffusers: the largest part, and the one that gradients pass through."""

    @abstractmethod
    def enable_gradient_checkpointing(self) -> None:
        """Makes the denoiser recompute its activations in the backward pass instead of storing them."""

    @abstractmethod
    def encode_moments(self, pixels: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, H, W)` in -1..1 to mean and log-variance of their latents, `(B, 2 * C, h, w)`."""

    @abstractmethod
    def sample_latents(
        self, moments: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> torch.Tensor:
        """Scaled latents `(B, C, h, w)`, float32, sampled from the posterior with the given moments.

        Args:
            moments: `(B, 2 * C, h, w)`, as `encode_moments` returns them.
            generator: Of the random numbers: one, or one for each image.
        """

    @abstractmethod
    def moments_shape(self, image_size: int) -> tuple[int, ...]:
        """`(2 * C, h, w)` of a square image of `image_size` pixels a side."""

    @abstractmethod
    def image_encoder_parts(self) -> tuple[nn.Module | None, ...]:
        """The modules that only `encode_moments` uses."""

    @abstractmethod
    def remove_image_encoder(self) -> None:
        """Frees `image_encoder_parts`. Latents can then be sampled from known moments, and decoded."""

    def encode_images(
        self, pixels: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> torch.Tensor:
        """Images `(B, 3, H, W)` in -1..1 to scaled latents `(B, C, h, w)`, sampled from the posterior, float32.

        Args:
            generator: Of the random numbers: one, or one for each image.
        """
        return self.sample_latents(self.encode_moments(pixels), generator)

    @abstractmethod
    def sample_timesteps(self, batch_size: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Random training timesteps `(B,)`, int64, on the CPU, by the family's own distribution."""

    def denoising_loss(
        self,
        latents: torch.Tensor,
        conditioning: torch.Tensor,
        noise: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss of `denoise`, a float32 scalar."""
        return self.denoise(latents, conditioning, noise, timesteps).loss

    @abstractmethod
    def denoise(
        self,
        latents: torch.Tensor,
        conditioning: torch.Tensor,
        noise: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        conditioning_mask: torch.Tensor | None = None,
    ) -> DenoisingOutput:
        """The error of the frozen denoiser's prediction for noised `latents` under `conditioning`.

        Args:
            latents: `(B, C, h, w)`, as `encode_images` returns them.
            conditioning: `(B, N, d_text)`. The loss has gradients with respect to it.
            noise: Shape of `latents`; random by default.
            timesteps: `(B,)`; from `sample_timesteps` by default.
            conditioning_mask: `(B, N)`, bool: which embeddings each image has; by default all.

        Returns:
            The mean squared error, or the loss that the subclass was configured with.
        """

    @abstractmethod
    def pipeline_components(self) -> dict[str, Any]:
        """The components of a `VLVReconstructionPipeline` that this model provides: `vae`, `unet` and `scheduler`."""


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
