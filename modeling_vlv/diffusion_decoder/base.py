"""The seam between VLV and the text-to-image model that it learns from."""

from abc import ABC, abstractmethod

import torch
from torch import nn


class DiffusionDecoder(nn.Module, ABC):
    """A frozen latent diffusion model, as stage 1 sees it.

    Frozen means: none of its parameters takes a gradient, it stays in evaluation mode whatever the trainer calls, and
    it is part of no checkpoint. Gradients still pass through it to the conditioning. How noise is added and what is
    predicted (noise, velocity, flow) is a family's business, never the trainer's.
    """

    image_size: int
    """Pixels, height and width, that the model was trained for."""

    def freeze(self) -> None:
        """Called by a family at the end of its `__init__`."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True):
        return super().train(False)

    @abstractmethod
    def enable_gradient_checkpointing(self) -> None:
        """Computes the denoiser's inner values anew in the backward pass instead of keeping them."""

    @abstractmethod
    def encode_images(self, pixels: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Pictures `(B, 3, H, W)` in -1..1 to scaled latents `(B, C, h, w)`, sampled from the posterior, float32."""

    @abstractmethod
    def sample_timesteps(self, batch_size: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Training timesteps `(B,)`, drawn as the family was trained (VLV paper: evenly)."""

    @abstractmethod
    def denoising_loss(
        self,
        latents: torch.Tensor,
        conditioning: torch.Tensor,
        noise: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """How badly the frozen denoiser, told `conditioning`, finds what was in the noised `latents`.

        Args:
            latents: `(B, C, h, w)`, as `encode_images` gives them.
            conditioning: `(B, Q, d_cond)`; the loss has gradients with respect to it.
            noise: Like `latents`; drawn if not given.
            timesteps: `(B,)`; drawn if not given.

        Returns:
            The mean squared error (or what the family was told to use instead), a scalar in float32.
        """
