"""The interface between VLV and the frozen text-to-image model that trains it."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn


class DiffusionDecoder(nn.Module, ABC):
    """A frozen latent diffusion model, as stage 1 uses it.

    Frozen means: no parameter requires a gradient, the module is always in evaluation mode, and no checkpoint contains
    it. Gradients pass through it to the conditioning. The subclass of each model family decides how noise is added and
    what the denoiser predicts (noise, velocity, flow). The trainer does not depend on either.
    """

    image_size: int
    """Height and width in pixels that the model was trained on."""

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

    @abstractmethod
    def denoising_loss(
        self,
        latents: torch.Tensor,
        conditioning: torch.Tensor,
        noise: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The error of the frozen denoiser's prediction for noised `latents` under `conditioning`.

        Args:
            latents: `(B, C, h, w)`, as `encode_images` returns them.
            conditioning: `(B, Q, d_text)`. The loss has gradients with respect to it.
            noise: Shape of `latents`; random by default.
            timesteps: `(B,)`; from `sample_timesteps` by default.

        Returns:
            A float32 scalar: the mean squared error, or the loss that the subclass was configured with.
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
