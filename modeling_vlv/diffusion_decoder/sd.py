"""The Stable Diffusion family, 1.x and 2.x: a UNet with one text encoder, discrete timesteps."""

from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn
from torch.nn import functional as F

from .base import (
    DenoisingOutput,
    DiffusionDecoder,
    logit_normal_timesteps,
    min_snr_weights,
    stratified_timesteps,
)
from .components import load_part

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss}
TIMESTEP_SAMPLINGS = ("uniform", "stratified", "logit_normal")


class StableDiffusionDecoder(DiffusionDecoder):
    """A frozen Stable Diffusion autoencoder and UNet.

    Args:
        vae: The autoencoder.
        unet: The denoiser.
        scheduler_config: Configuration of any diffusers scheduler. Its betas, prediction type and zero-terminal-SNR
            rescaling are used; its sampling method is not.
        timestep_sampling: `"uniform"`, independent timesteps as in the paper, `"stratified"`, see
            `stratified_timesteps`, or `"logit_normal"`, see `logit_normal_timesteps`.
        min_timestep: Lowest training timestep. 0 uses the complete schedule, as in the paper. At low noise the
            conditioning has little influence on the loss, so a short training can leave that range out.
        loss: `"mse"` (the paper), or `"l1"`, which the authors' code offers.
        vae_dtype: Precision of the autoencoder, whatever the UNet's is: float32, as in the authors' code, or bfloat16.
            The encoder overflows in float16. Latents are float32 in any case.
        max_timestep: Highest training timestep; None for the last of the schedule.
        snr_gamma: Above 0: the loss of each image is weighted by Min-SNR, see `min_snr_weights`; 0 for no weights.

    Raises:
        ValueError: If the scheduler is a flow-matching model's, or an argument is not one of the allowed values.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        scheduler_config: dict[str, Any],
        timestep_sampling: str = "uniform",
        min_timestep: int = 0,
        loss: str = "mse",
        vae_dtype: torch.dtype = torch.float32,
        max_timestep: int | None = None,
        snr_gamma: float = 0.0,
    ):
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f"loss is {loss!r}; expected one of {tuple(LOSSES)}")
        if "beta_schedule" not in scheduler_config:
            name = scheduler_config.get("_class_name", "this scheduler")
            raise ValueError(
                f"{name} has no beta schedule; expected the scheduler of a Stable Diffusion 1.x or 2.x model, not of "
                "a flow-matching model"
            )
        prediction_type = scheduler_config.get("prediction_type", "epsilon")
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type is {prediction_type!r}; expected one of {PREDICTION_TYPES}")
        if timestep_sampling not in TIMESTEP_SAMPLINGS:
            raise ValueError(f"timestep_sampling is {timestep_sampling!r}; expected one of {TIMESTEP_SAMPLINGS}")
        steps = scheduler_config.get("num_train_timesteps", 1000)
        if not 0 <= min_timestep < steps:
            raise ValueError(f"min_timestep is {min_timestep}; expected 0 to {steps - 1}")
        if max_timestep is not None and not min_timestep <= max_timestep < steps:
            raise ValueError(
                f"max_timestep is {max_timestep}; expected {min_timestep} (min_timestep) to {steps - 1}, or none"
            )
        if not 0 <= snr_gamma < float("inf"):
            raise ValueError(f"snr_gamma is {snr_gamma}; expected 0 (off) or a number above it, such as 5")
        self.vae = vae.bfloat16() if vae_dtype == torch.bfloat16 else vae.float()
        self.unet = unet
        self.scheduler = DDPMScheduler.from_config(scheduler_config)
        self.prediction_type, self.loss = prediction_type, LOSSES[loss]
        self.timestep_sampling, self.min_timestep = timestep_sampling, min_timestep
        self.max_timestep = steps - 1 if max_timestep is None else max_timestep
        self.snr_gamma, self.num_timesteps = snr_gamma, steps
        self.scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        sample_size = unet.config.sample_size
        self.image_size = (sample_size if isinstance(sample_size, int) else sample_size[0]) * self.scale_factor
        self.freeze()

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        dtype: torch.dtype = torch.float32,
        timestep_sampling: str = "uniform",
        min_timestep: int = 0,
        loss: str = "mse",
        vae_dtype: torch.dtype = torch.float32,
        max_timestep: int | None = None,
        snr_gamma: float = 0.0,
    ) -> "StableDiffusionDecoder":
        """Loads `vae`, `unet` and `scheduler` from a diffusers folder or repo id; weights only from safetensors."""
        return cls(
            load_part(AutoencoderKL, model, "vae", torch_dtype=vae_dtype),
            load_part(UNet2DConditionModel, model, "unet", torch_dtype=dtype),
            DDPMScheduler.load_config(model, subfolder="scheduler"),
            timestep_sampling,
            min_timestep,
            loss,
            vae_dtype,
            max_timestep,
            snr_gamma,
        )

    @property
    def denoiser(self) -> UNet2DConditionModel:
        return self.unet

    @property
    def timestep_range(self) -> tuple[int, int]:
        return self.min_timestep, self.max_timestep

    def enable_gradient_checkpointing(self) -> None:
        self.unet.enable_gradient_checkpointing()

    @torch.no_grad()
    def encode_moments(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.vae.encoder is None:
            raise ValueError("the autoencoder's encoder has been removed; load the model anew to encode images")
        if pixels.ndim != 4 or pixels.shape[2] % self.scale_factor or pixels.shape[3] % self.scale_factor:
            raise ValueError(
                f"pixels must be (batch, 3, height, width) with sides divisible by {self.scale_factor}, "
                f"got {tuple(pixels.shape)}"
            )
        with torch.autocast(pixels.device.type, enabled=False):
            return self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.parameters

    @torch.no_grad()
    def sample_latents(
        self, moments: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> torch.Tensor:
        latents = DiagonalGaussianDistribution(moments).sample(generator)  # (B, C, h, w)
        return (latents.float() - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor

    def moments_shape(self, image_size: int) -> tuple[int, ...]:
        side = image_size // self.scale_factor
        return 2 * self.vae.config.latent_channels, side, side

    def image_encoder_parts(self) -> tuple[nn.Module | None, ...]:
        return self.vae.encoder, self.vae.quant_conv

    def remove_image_encoder(self) -> None:
        self.vae.encoder = self.vae.quant_conv = None

    def sample_timesteps(self, batch_size: int, generator: torch.Generator | None = None) -> torch.Tensor:
        first, last = self.timestep_range
        if self.timestep_sampling == "uniform":
            return torch.randint(first, last + 1, (batch_size,), generator=generator)
        if self.timestep_sampling == "logit_normal":
            return logit_normal_timesteps(batch_size, first, last, generator)
        return stratified_timesteps(batch_size, first, last, generator)

    def denoise(
        self,
        latents: torch.Tensor,
        conditioning: torch.Tensor,
        noise: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        conditioning_mask: torch.Tensor | None = None,
    ) -> DenoisingOutput:
        if timesteps is None:
            timesteps = self.sample_timesteps(len(latents))
        timesteps = timesteps.to(latents.device)
        if noise is None:
            noise = torch.randn_like(latents)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)  # (B, C, h, w)
        dtype = self.unet.dtype
        output = self.unet(
            noisy.to(dtype), timesteps, conditioning.to(dtype), encoder_attention_mask=conditioning_mask
        )
        predicted, target = output.sample.float(), self._target(latents, noise, timesteps).float()
        if self.snr_gamma:
            errors = self.loss(predicted, target, reduction="none").mean(dim=(1, 2, 3))  # (B,)
            kept = self.scheduler.alphas_cumprod.to(errors.device)[timesteps]  # share of the signal's variance
            weights = min_snr_weights(kept / (1 - kept), self.snr_gamma, self.prediction_type)
            return DenoisingOutput((weights * errors).mean(), errors.detach(), timesteps)
        with torch.no_grad():
            errors = self.loss(predicted, target, reduction="none").mean(dim=(1, 2, 3))
        return DenoisingOutput(self.loss(predicted, target), errors, timesteps)

    def pipeline_components(self) -> dict[str, Any]:
        return {"vae": self.vae, "unet": self.unet, "scheduler": self.scheduler}

    def _target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, timesteps)
        return latents
