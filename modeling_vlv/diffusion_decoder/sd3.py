"""Stable Diffusion 3 and 3.5: a transformer that reads text and latents as one sequence, trained by flow matching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import diffusers
import torch
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from .base import Conditioning, DiffusionDecoder
from .components import load_part

EMPTY_POSITIONS = 256  # zeros in place of T5's states, as in diffusers' pipeline


class StableDiffusion3Decoder(DiffusionDecoder):
    """A frozen Stable Diffusion 3 or 3.5 autoencoder and transformer (Esser et al., 2024, arXiv 2403.03206).

    The hidden states before the last layer of CLIP-L and CLIP-G stand side by side, `(B, N, 768 + 1280)`, and their
    projected states at the last position are the pooled conditioning, `(B, 2048)`. With T5 its last hidden state is
    the third part of the conditioning, `(B, N, 768 + 1280 + 4096)`. `arrange_conditioning` makes of it the sequence
    that the transformer reads.

    Timestep `t` has the noise level `sigma = shift * s / (1 + (shift - 1) * s)` with `s = (t + 1) / num_timesteps`.
    The noised latents are `(1 - sigma) * latents + sigma * noise`, and the transformer predicts their velocity,
    `noise - latents`. Timesteps are logit-normal by default, as in the paper, with equal weights.

    Args:
        vae: The autoencoder.
        transformer: The denoiser.
        scheduler_config: Configuration of a flow-matching scheduler of diffusers. Its number of timesteps and `shift`
            are used; its sampling method is not.
        timestep_sampling, min_timestep, loss, vae_dtype, max_timestep: As in `DiffusionDecoder`.
        snr_gamma: 0. Min-SNR weights are not defined for flow matching.

    Raises:
        ValueError: If the scheduler is not a flow-matching model's, or shifts by the size of the image, or an argument
            is not one of the allowed values.
    """

    family = "sd3"
    title = "Stable Diffusion 3 or 3.5"
    models: ClassVar = {"transformer": "SD3Transformer2DModel", "vae": "AutoencoderKL"}
    text_encoders: ClassVar = {
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    optional_text_encoders: ClassVar = {"text_encoder_3": T5EncoderModel}
    tokenizers = ("tokenizer", "tokenizer_2", "tokenizer_3")
    conditioning_layers = ((-2,), (-2,), (-1,))
    pooled_conditioning = (0, 1)
    scheduler_field = "shift"
    timestep_sampling = "logit_normal"
    reconstruction_pipeline = ("pipeline_vlv_pooled_reconstruction", "VLVPooledReconstructionPipeline")

    sigmas: torch.Tensor

    def __init__(
        self,
        vae: diffusers.AutoencoderKL,
        transformer: diffusers.SD3Transformer2DModel,
        scheduler_config: Mapping[str, Any],
        timestep_sampling: str | None = None,
        min_timestep: int = 0,
        loss: str = "mse",
        vae_dtype: torch.dtype = torch.float32,
        max_timestep: int | None = None,
        snr_gamma: float = 0.0,
    ):
        steps = scheduler_config.get("num_train_timesteps", 1000)
        super().__init__(vae, timestep_sampling, min_timestep, loss, vae_dtype, max_timestep, steps)
        if "shift" not in scheduler_config:
            name = scheduler_config.get("_class_name", "this scheduler")
            raise ValueError(
                f"{name} has no shift; expected the scheduler of a {self.title} model, such as "
                "FlowMatchEulerDiscreteScheduler"
            )
        if scheduler_config.get("use_dynamic_shifting"):
            raise ValueError(
                f"use_dynamic_shifting is set in the scheduler's configuration; a {self.title} model is trained with "
                "one shift for all sizes: set use_dynamic_shifting to false and shift to a number, such as 3.0"
            )
        if snr_gamma:
            raise ValueError(
                f"snr_gamma is {snr_gamma}, but {self.title} is trained by flow matching, for which Min-SNR weights "
                "are not defined; leave snr_gamma out"
            )
        self.transformer = transformer
        self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(scheduler_config)
        self.register_buffer("sigmas", self.scheduler.sigmas.flip(0), persistent=False)  # (timesteps,), ascending
        self.size_multiple = self.scale_factor * transformer.config.patch_size
        self.image_size = transformer.config.sample_size * self.scale_factor
        self.freeze()

    @classmethod
    def from_pretrained(
        cls, model: str, *, dtype: torch.dtype = torch.float32, vae_dtype: torch.dtype = torch.float32, **kwargs: Any
    ) -> StableDiffusion3Decoder:
        return cls(
            load_part(diffusers.AutoencoderKL, model, "vae", torch_dtype=vae_dtype),
            load_part(diffusers.SD3Transformer2DModel, model, "transformer", torch_dtype=dtype),
            diffusers.FlowMatchEulerDiscreteScheduler.load_config(model, subfolder="scheduler"),
            vae_dtype=vae_dtype,
            **kwargs,
        )

    @classmethod
    def describe_prediction(cls, scheduler_config: Mapping[str, Any]) -> str:
        return "velocity (flow matching)"

    @property
    def denoiser(self) -> diffusers.SD3Transformer2DModel:
        return self.transformer

    @classmethod
    def reads(cls, denoiser: Any, widths: Sequence[int]) -> bool:
        joint = denoiser.config.joint_attention_dim
        return len(widths) in (2, 3) and sum(widths[:2]) <= joint and all(width == joint for width in widths[2:])

    @classmethod
    def pooled_width(cls, denoiser: Any) -> int:
        return denoiser.config.pooled_projection_dim

    @classmethod
    def describe_conditioning(cls, denoiser: Any) -> str:
        joint = denoiser.config.joint_attention_dim
        return f"two text encoders, together at most {joint} wide, and a third one, T5, of width {joint} or none"

    def add_noise(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sigmas = self.sigmas[timesteps].view(-1, 1, 1, 1)  # (B, 1, 1, 1)
        return (1 - sigmas) * latents + sigmas * noise, noise - latents

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        if conditioning.mask is None:
            return self._predict(noisy, timesteps, conditioning.hidden_states, conditioning.pooled)
        assert conditioning.pooled is not None
        counts = conditioning.mask.sum(dim=1)  # (B,); the transformer has no mask, so equal lengths go together
        predicted = torch.empty_like(noisy)
        for count in counts.unique().tolist():
            rows = counts == count
            states, pooled = conditioning.hidden_states[rows, :count], conditioning.pooled[rows]
            predicted[rows] = self._predict(noisy[rows], timesteps[rows], states, pooled).to(predicted)
        return predicted

    def _predict(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, hidden_states: torch.Tensor, pooled: torch.Tensor | None
    ) -> torch.Tensor:
        assert pooled is not None
        dtype = self.transformer.dtype
        return self.transformer(
            hidden_states=noisy.to(dtype),
            timestep=self.sigmas[timesteps] * self.num_timesteps,
            encoder_hidden_states=arrange_conditioning(hidden_states, self.transformer.config.joint_attention_dim).to(
                dtype
            ),
            pooled_projections=pooled.to(dtype),
        ).sample

    def pipeline_components(self) -> dict[str, Any]:
        return {"vae": self.vae, "transformer": self.transformer, "scheduler": self.scheduler}


def arrange_conditioning(hidden_states: torch.Tensor, joint_width: int) -> torch.Tensor:
    """The sequence that the transformer reads: the states of both CLIP, then those of T5.

    Args:
        hidden_states: `(B, N, d_clip)`, or with T5 `(B, N, d_clip + joint_width)`; `d_clip` is at most `joint_width`.
        joint_width: The transformer's `joint_attention_dim`.

    Returns:
        `(B, N + 256, joint_width)`, without T5 with zeros in its place, or with T5 `(B, 2 * N, joint_width)`.
    """
    width = hidden_states.shape[2]
    if width > joint_width:
        clip, t5 = hidden_states.split([width - joint_width, joint_width], dim=2)
    else:
        clip, t5 = hidden_states, hidden_states.new_zeros(len(hidden_states), EMPTY_POSITIONS, joint_width)
    return torch.cat([F.pad(clip, (0, joint_width - clip.shape[2])), t5], dim=1)
