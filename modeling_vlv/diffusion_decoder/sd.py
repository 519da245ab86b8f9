"""The Stable Diffusion family, 1.x and 2.x: a UNet with one text encoder, discrete timesteps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import diffusers
import torch
from transformers import CLIPTextModel

from .base import Conditioning, DiffusionDecoder
from .components import load_part
from .timesteps import min_snr_weights

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class StableDiffusionDecoder(DiffusionDecoder):
    """A frozen Stable Diffusion autoencoder and UNet.

    Args:
        vae: The autoencoder.
        unet: The denoiser.
        scheduler_config: Configuration of any diffusers scheduler. Its betas, prediction type and zero-terminal-SNR
            rescaling are used; its sampling method is not.
        timestep_sampling, min_timestep, loss, vae_dtype, max_timestep: As in `DiffusionDecoder`.
        snr_gamma: Above 0: the loss of each image is weighted by Min-SNR, see `min_snr_weights`; 0 for no weights.

    Raises:
        ValueError: If the scheduler is a flow-matching model's, or an argument is not one of the allowed values.
    """

    family = "sd"
    title = "Stable Diffusion 1.x or 2.x"
    models: ClassVar = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
    text_encoders: ClassVar = {"text_encoder": CLIPTextModel}
    reconstruction_pipeline = ("pipeline_vlv_reconstruction", "VLVReconstructionPipeline")
    modular_blocks: ClassVar = "modular_vlv_sd"

    def __init__(
        self,
        vae: diffusers.AutoencoderKL,
        unet: diffusers.UNet2DConditionModel,
        scheduler_config: dict[str, Any],
        timestep_sampling: str | None = None,
        min_timestep: int = 0,
        loss: str = "mse",
        vae_dtype: torch.dtype = torch.float32,
        max_timestep: int | None = None,
        snr_gamma: float = 0.0,
    ):
        steps = scheduler_config.get("num_train_timesteps", 1000)
        super().__init__(vae, timestep_sampling, min_timestep, loss, vae_dtype, max_timestep, steps)
        if "beta_schedule" not in scheduler_config:
            name = scheduler_config.get("_class_name", "this scheduler")
            raise ValueError(
                f"{name} has no beta schedule; expected the scheduler of a {self.title} model, not of a flow-matching "
                "model"
            )
        prediction_type = scheduler_config.get("prediction_type", "epsilon")
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type is {prediction_type!r}; expected one of {PREDICTION_TYPES}")
        if not 0 <= snr_gamma < float("inf"):
            raise ValueError(f"snr_gamma is {snr_gamma}; expected 0 (off) or a number above it, such as 5")
        self.unet = unet
        self.scheduler = diffusers.DDPMScheduler.from_config(scheduler_config)
        self.prediction_type, self.snr_gamma = prediction_type, snr_gamma
        sample_size = unet.config.sample_size
        self.image_size = (sample_size if isinstance(sample_size, int) else sample_size[0]) * self.scale_factor
        self.freeze()

    @classmethod
    def from_pretrained(
        cls, model: str, *, dtype: torch.dtype = torch.float32, vae_dtype: torch.dtype = torch.float32, **kwargs: Any
    ) -> StableDiffusionDecoder:
        return cls(
            load_part(diffusers.AutoencoderKL, model, "vae", torch_dtype=vae_dtype),
            load_part(diffusers.UNet2DConditionModel, model, "unet", torch_dtype=dtype),
            diffusers.DDPMScheduler.load_config(model, subfolder="scheduler"),
            vae_dtype=vae_dtype,
            **kwargs,
        )

    @classmethod
    def describe_prediction(cls, scheduler_config: Mapping[str, Any]) -> str:
        return scheduler_config.get("prediction_type", "epsilon")  # diffusers' default

    @property
    def denoiser(self) -> diffusers.UNet2DConditionModel:
        return self.unet

    @classmethod
    def reads(cls, denoiser: Any, widths: Sequence[int]) -> bool:
        return len(widths) == len(cls.text_encoders) and sum(widths) == denoiser.config.cross_attention_dim

    @classmethod
    def describe_conditioning(cls, denoiser: Any) -> str:
        count = "one text encoder" if len(cls.text_encoders) == 1 else f"{len(cls.text_encoders)} text encoders"
        return f"conditioning of width {denoiser.config.cross_attention_dim} from {count}"

    def add_noise(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        if self.prediction_type == "epsilon":
            return noisy, noise
        if self.prediction_type == "v_prediction":
            return noisy, self.scheduler.get_velocity(latents, noise, timesteps)
        return noisy, latents

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        dtype = self.unet.dtype
        return self.unet(
            noisy.to(dtype),
            timesteps,
            conditioning.hidden_states.to(dtype),
            encoder_attention_mask=conditioning.mask,
            added_cond_kwargs=self.added_conditions(noisy, conditioning),
        ).sample

    def added_conditions(self, noisy: torch.Tensor, conditioning: Conditioning) -> dict[str, torch.Tensor] | None:
        """What the UNet reads beside latents, timestep and hidden states; None in this family."""
        return None

    def loss_weights(self, timesteps: torch.Tensor) -> torch.Tensor | None:
        if not self.snr_gamma:
            return None
        kept = self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps]  # share of the signal's variance
        return min_snr_weights(kept / (1 - kept), self.snr_gamma, self.prediction_type)

    def pipeline_components(self) -> dict[str, Any]:
        return {"vae": self.vae, "unet": self.unet, "scheduler": self.scheduler}
