"""The miniature's autoencoder: a plain, narrow `AutoencoderKL` from 64 x 64 pixels to 8 x 8 latents."""

import os
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn

from .data import SceneDataset
from .training import MovingAverageCallback, train_module

LATENT_CHANNELS = 16
KL_WEIGHT = 1e-6


def build_autoencoder(latent_channels: int = LATENT_CHANNELS) -> AutoencoderKL:
    """An autoencoder without attention that is narrow at full resolution, where most of the computation is."""
    widths = (16, 32, 64, 128)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


class AutoencoderLoss(nn.Module):
    """Absolute plus squared error of the reconstruction, plus a very small KL term that keeps latents bounded."""

    def __init__(self, autoencoder: AutoencoderKL):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        pixels = pixels.float() / 127.5 - 1  # (B, 3, 64, 64)
        posterior = self.autoencoder.encode(pixels).latent_dist
        reconstruction = self.autoencoder.decode(posterior.sample()).sample
        error = reconstruction.float() - pixels
        loss = error.abs().mean() + error.pow(2).mean() + KL_WEIGHT * posterior.kl().mean()
        return {"loss": loss}


@torch.no_grad()
def remove_posterior_variance(autoencoder: AutoencoderKL) -> None:
    """Sets the variance of the posterior close to zero, so that a sample equals the mean.

    The KL term turns channels that the VAE's decoder does not need into noise. No denoiser can predict that noise, and
    a third of its loss would be noise.
    """
    channels = autoencoder.config.latent_channels
    autoencoder.quant_conv.weight[channels:] = 0.0
    autoencoder.quant_conv.bias[channels:] = -20.0  # the logarithm of the variance


@torch.no_grad()
def measure_scaling_factor(autoencoder: AutoencoderKL, n: int = 512) -> float:
    """One over the standard deviation of the latents, as Stable Diffusion defines `scaling_factor`."""
    data = SceneDataset(n, seed=7)
    latents = [
        autoencoder.encode(
            torch.stack([data[i]["pixels"] for i in range(start, min(start + 64, n))]) / 127.5 - 1
        ).latent_dist.mean
        for start in range(0, n, 64)
    ]
    return 1 / torch.cat(latents).std().item()


@torch.no_grad()
def reconstruct_pixels(autoencoder: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Reconstructions of images, both `(B, 3, 64, 64)` uint8, from the mean of the posterior."""
    latents = autoencoder.encode(pixels.float() / 127.5 - 1).latent_dist.mean
    return ((autoencoder.decode(latents).sample + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def measure_psnr(autoencoder: AutoencoderKL, split: str = "test", n: int = 256) -> float:
    """The mean peak signal-to-noise ratio of the reconstructions of `n` images, in dB."""
    data = SceneDataset(n, split=split, seed=11)
    total = 0.0
    for start in range(0, n, 64):
        pixels = torch.stack([data[i]["pixels"] for i in range(start, min(start + 64, n))])
        error = (reconstruct_pixels(autoencoder, pixels).float() - pixels.float()).pow(2).flatten(1).mean(1)
        total += (10 * torch.log10(255**2 / error)).sum().item()
    return total / n


def train_autoencoder(
    output_dir: str | Path,
    work_dir: str | Path,
    images: int = 150_000,
    batch_size: int = 16,
    learning_rate: float = 2e-3,
    latent_channels: int = LATENT_CHANNELS,
    evaluation_images: int = 256,
    scaling_images: int = 512,
    seed: int = 0,
) -> None:
    """Trains the autoencoder on rendered scenes of `train` and saves it to `output_dir` in diffusers' format.

    Args:
        evaluation_images: Number of unseen images whose reconstructions are measured at the end.
        scaling_images: Number of images whose latents give the `scaling_factor`.
    """
    torch.manual_seed(seed)
    module = AutoencoderLoss(build_autoencoder(latent_channels))
    averaging = MovingAverageCallback(module.autoencoder, decay=0.995)
    train_module(
        module,
        SceneDataset(images, seed=seed),
        work_dir,
        batch_size=batch_size,
        learning_rate=learning_rate,
        callbacks=(averaging,),
        seed=seed,
        bf16=True,
        adam_beta2=0.95,
    )
    if int(os.environ.get("RANK", "0")):
        return
    average: AutoencoderKL = averaging.average
    remove_posterior_variance(average)
    average.register_to_config(scaling_factor=measure_scaling_factor(average, scaling_images))
    average.save_pretrained(output_dir)
    print(f"autoencoder: {measure_psnr(average, n=evaluation_images):.2f} dB on unseen scenes")
