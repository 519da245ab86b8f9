"""The interface between VLV and the frozen text-to-image model that trains it.

diffusers imports its models when they are first used. The files of the families therefore name them, so that captions
alone do not wait for them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import diffusers
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..modeling_vlv import VLVConfig, VLVModelOutput
from .components import load_part
from .timesteps import TIMESTEP_SAMPLINGS, logit_normal_timesteps, stratified_timesteps

LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss}


@dataclass
class Conditioning:
    """What the denoiser reads beside latents and timestep.

    Attributes:
        hidden_states: `(B, N, d_cond)`, the conditioning of a `VLVModel`.
        pooled: `(B, d_pooled)`, its pooled conditioning; None in families without one.
        mask: `(B, N)`, bool: which of the `N` embeddings each image has; None for all.
    """

    hidden_states: torch.Tensor
    pooled: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    @classmethod
    def of(cls, output: VLVModelOutput) -> Conditioning:
        """The conditioning in the output of a `VLVModel`."""
        assert output.conditioning is not None
        return cls(output.conditioning, output.pooled_conditioning)


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
    """A frozen latent diffusion model, as stage 1 uses it. A subclass is a family of models.

    Frozen means: no parameter requires a gradient, the module is always in evaluation mode, and no checkpoint contains
    it. Gradients pass through it to the conditioning. The family says which text encoders it has and what conditioning
    they make (class attributes), how noise is added and what the denoiser predicts (`add_noise`, `predict`), and which
    pipeline samples images. Trainers, export, commands and the Space ask the family, and never depend on its class.

    Args:
        vae: The autoencoder.
        timestep_sampling: `"uniform"`, independent timesteps, `"stratified"`, see `stratified_timesteps`, or
            `"logit_normal"`, see `logit_normal_timesteps`; by default the family's own.
        min_timestep: Lowest training timestep. 0 uses the complete schedule, as in the paper. At low noise the
            conditioning has little influence on the loss, so a short training can leave that range out.
        loss: `"mse"` (the paper), or `"l1"`, which the authors' code offers.
        vae_dtype: Precision of the autoencoder, whatever the denoiser's is: float32, as in the authors' code, or
            bfloat16. The encoder overflows in float16. Latents are float32 in any case.
        max_timestep: Highest training timestep; None for the last of the schedule.
        num_timesteps: Number of timesteps of the complete schedule.

    Raises:
        ValueError: If an argument is not one of the allowed values.
    """

    family: ClassVar[str]
    """The family's short name in configurations and records, such as `"sd"`."""
    title: ClassVar[str]
    """The family's name in messages, such as `"Stable Diffusion 1.x or 2.x"`."""
    models: ClassVar[Mapping[str, str]]
    """The components that are models of diffusers, `vae` among them, and the names of their classes."""
    text_encoders: ClassVar[Mapping[str, type[PreTrainedModel]]]
    """The text encoders, by their names in diffusers, and their classes."""
    optional_text_encoders: ClassVar[Mapping[str, type[PreTrainedModel]]] = {}
    """Text encoders that the family works without."""
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    """One for each of `text_encoders`, and then of `optional_text_encoders`."""
    conditioning_layers: ClassVar[Sequence[Sequence[int]]] = ((-1,),)
    """As in `VLVConfig`, for `text_encoders` and then `optional_text_encoders`."""
    pooled_conditioning: ClassVar[Sequence[int]] = ()
    """As in `VLVConfig`."""
    pipeline_settings: ClassVar[Mapping[str, Any]] = {}
    """Settings of the reconstruction pipeline that stand in `model_index.json`, and their defaults."""
    scheduler_field: ClassVar[str] = "beta_schedule"
    """A field that the configuration of a fitting scheduler has."""
    timestep_sampling: str = "uniform"
    """How timesteps are drawn; the class attribute is the family's default."""
    reconstruction_pipeline: ClassVar[tuple[str, str]]
    """Module and class of the pipeline that reconstructs images, in `vlv.pipelines`."""
    modular_blocks: ClassVar[str | None] = None
    """Module of its blocks for Modular Diffusers, in `vlv.pipelines`."""

    image_size: int
    """Height and width in pixels that the model was trained on."""
    num_timesteps: int
    """Number of timesteps of the complete schedule: 0 to `num_timesteps - 1`, the last has most noise."""
    size_multiple: int
    """Height and width of images are divisible by it; by default the autoencoder's scale."""

    def __init__(
        self,
        vae: diffusers.AutoencoderKL,
        timestep_sampling: str | None = None,
        min_timestep: int = 0,
        loss: str = "mse",
        vae_dtype: torch.dtype = torch.float32,
        max_timestep: int | None = None,
        num_timesteps: int = 1000,
    ):
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f"loss is {loss!r}; expected one of {tuple(LOSSES)}")
        if timestep_sampling is not None and timestep_sampling not in TIMESTEP_SAMPLINGS:
            raise ValueError(f"timestep_sampling is {timestep_sampling!r}; expected one of {TIMESTEP_SAMPLINGS}")
        if not 0 <= min_timestep < num_timesteps:
            raise ValueError(f"min_timestep is {min_timestep}; expected 0 to {num_timesteps - 1}")
        if max_timestep is not None and not min_timestep <= max_timestep < num_timesteps:
            raise ValueError(
                f"max_timestep is {max_timestep}; expected {min_timestep} (min_timestep) to {num_timesteps - 1}, or "
                "none"
            )
        self.vae = vae.bfloat16() if vae_dtype == torch.bfloat16 else vae.float()
        self.timestep_sampling = timestep_sampling or type(self).timestep_sampling
        self.min_timestep = min_timestep
        self.max_timestep = num_timesteps - 1 if max_timestep is None else max_timestep
        self.loss, self.num_timesteps = LOSSES[loss], num_timesteps
        self.scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.size_multiple = self.scale_factor

    @classmethod
    def fits(cls, index: Mapping[str, Any]) -> bool:
        """Whether a `model_index.json`, of a text-to-image model or of a VLV, has the components of this family."""
        present = {name for name, entry in index.items() if isinstance(entry, (list, tuple)) and entry[0] is not None}
        denoiser = cls.denoiser_name()
        return (
            {*cls.models, *cls.tokenizers[: len(cls.text_encoders)]} <= present
            and index[denoiser][1] == cls.models[denoiser]
            and f"tokenizer_{len(cls.tokenizers) + 1}" not in present
        )

    @classmethod
    @abstractmethod
    def describe_prediction(cls, scheduler_config: Mapping[str, Any]) -> str:
        """What the denoiser predicts, for a description of the model, such as `"epsilon"`."""

    @classmethod
    def denoiser_name(cls) -> str:
        """The component that is the denoiser."""
        return next(name for name in cls.models if name != "vae")

    @classmethod
    def model_classes(cls) -> dict[str, Any]:
        """The classes of `models`, by the names of the components."""
        return {name: getattr(diffusers, class_name) for name, class_name in cls.models.items()}

    @classmethod
    def component_names(cls) -> tuple[str, ...]:
        """The components of the reconstruction pipeline, without encoder and image processor."""
        return (*cls.models, "scheduler", *cls.tokenizers)

    @classmethod
    @abstractmethod
    def from_pretrained(
        cls, model: str, *, dtype: torch.dtype = torch.float32, vae_dtype: torch.dtype = torch.float32, **kwargs: Any
    ) -> DiffusionDecoder:
        """Loads the components from a diffusers folder or repo id; weights only from safetensors.

        Args:
            dtype: Precision of the denoiser.
            vae_dtype: Precision of the autoencoder.
            kwargs: Arguments of the class.
        """

    @classmethod
    def load_text_encoders(cls, model: str, with_optional: bool = False) -> list[PreTrainedModel]:
        """The text encoders of a diffusers folder or repo id, in order.

        Args:
            with_optional: Also `optional_text_encoders`.

        Raises:
            ValueError: If one of them is missing, or of another class.
        """
        classes = {**cls.text_encoders, **(cls.optional_text_encoders if with_optional else {})}
        return [load_part(part_class, model, name) for name, part_class in classes.items()]

    @classmethod
    def text_settings(cls, num_text_encoders: int) -> dict[str, Any]:
        """The fields of `VLVConfig` by which its text encoders make the conditioning of this family."""
        layers = [list(layers) for layers in cls.conditioning_layers[:num_text_encoders]]
        return {"conditioning_layers": layers, "pooled_conditioning": list(cls.pooled_conditioning)}

    @classmethod
    def check_model(cls, denoiser: Any, config: VLVConfig, model: str, source: str) -> None:
        """Raises `ValueError` if the denoiser cannot read the conditioning of a model with this configuration.

        Args:
            model: Name of the VLV, for the message.
            source: Name of the text-to-image model, for the message.
        """
        own = cls.text_settings(len(config.text_encoder_configs))
        given = {"conditioning_layers": config.conditioning_layers, "pooled_conditioning": config.pooled_conditioning}
        widths = [encoder.hidden_size for encoder in config.text_encoder_configs]
        pooled = sum(config.text_encoder_configs[number].projection_dim for number in config.pooled_conditioning)

        def describe(width: int) -> str:
            return f" and pooled states of width {width}" if width else ""

        if own != given or not cls.reads(denoiser, widths) or pooled != cls.pooled_width(denoiser):
            raise ValueError(
                f"{model} and {source} do not fit together: {source} is a {cls.title}, whose denoiser reads "
                f"{cls.describe_conditioning(denoiser)}{describe(cls.pooled_width(denoiser))}, but {model} has "
                f"{'one text encoder' if len(widths) == 1 else f'{len(widths)} text encoders'} of width "
                f"{' and '.join(map(str, widths))}, for conditioning_layers {config.conditioning_layers} and "
                f"pooled_conditioning {config.pooled_conditioning}{describe(pooled)}; give the text-to-image model "
                f"that {model} was trained with"
            )

    @classmethod
    def check_tokenizers(cls, tokenizers: Mapping[str, Any], config: VLVConfig, model: str, source: str) -> None:
        """Raises `ValueError` if a tokenizer has words that its text encoder does not know.

        Args:
            tokenizers: By the names in `tokenizers` of the class.
            config, model, source: As in `check_model`.
        """
        for name, encoder in zip(cls.tokenizers, config.text_encoder_configs, strict=False):
            tokenizer = tokenizers.get(name)
            if tokenizer is not None and len(tokenizer) > encoder.vocab_size:
                raise ValueError(
                    f"{model} and {source} do not fit together: {name} of {source} has {len(tokenizer)} words, but "
                    f"the text encoder of {model} that reads them knows {encoder.vocab_size}; replace {name} by that "
                    f"of the text-to-image model that {model} was trained with"
                )

    @classmethod
    def check_components(cls, components: Mapping[str, Any], config: VLVConfig, model: str, source: str) -> None:
        """Raises `ValueError` if the components of a text-to-image model do not fit a VLV: `check_model`,
        `check_tokenizers`, and whether each text encoder has its tokenizer.

        Args:
            components: By their names in diffusers.
            config, model, source: As in `check_model`.
        """
        cls.check_model(components[cls.denoiser_name()], config, model, source)
        cls.check_tokenizers(components, config, model, source)
        needed = cls.tokenizers[: len(config.text_encoder_configs)]
        if missing := [name for name in needed if components.get(name) is None]:
            raise ValueError(
                f"{source} has no {' and no '.join(missing)}, but {model} has {len(needed)} text encoders, which need "
                f"their tokenizers; give a complete folder of the text-to-image model that {model} was trained with"
            )

    @classmethod
    @abstractmethod
    def reads(cls, denoiser: Any, widths: Sequence[int]) -> bool:
        """Whether the denoiser can be conditioned on text encoders of these widths."""

    @classmethod
    def pooled_width(cls, denoiser: Any) -> int:
        """The width of the pooled states that the denoiser reads, side by side; 0 where it reads none."""
        return 0

    @classmethod
    @abstractmethod
    def describe_conditioning(cls, denoiser: Any) -> str:
        """What the denoiser reads, for a message, such as `"conditioning of width 1024"`."""

    @torch.no_grad()
    def encode_texts(
        self,
        model: nn.Module,
        tokenizers: Mapping[str, Any],
        texts: Sequence[str],
        device: torch.device | str = "cpu",
        num_positions: int | None = None,
    ) -> Conditioning:
        """The conditioning of texts, as diffusers' text-to-image pipeline forms it: padded or cut to all positions.

        Args:
            model: A `VLVModel`, or what wraps it.
            tokenizers: One for each text encoder, by the names in `tokenizers` of the class.
            texts: `B` texts.
            num_positions: How many of the positions are kept, from the front; by default all.

        Returns:
            Of `B` rows, `(B, N, d_cond)`, with `N` the positions of the text encoder, or `num_positions`.
        """
        config: Any = getattr(model, "module", model).config
        settings = {"padding": "max_length", "max_length": config.num_text_positions, "truncation": True}
        ids = [
            tokenizers[name](list(texts), return_tensors="pt", **settings).input_ids[:, :num_positions].to(device)
            for name in self.tokenizers[: len(config.text_encoder_configs)]
        ]
        return Conditioning.of(model(input_ids=ids))

    def unconditional(
        self,
        model: nn.Module,
        tokenizers: Mapping[str, Any],
        device: torch.device | str = "cpu",
        num_positions: int | None = None,
    ) -> Conditioning:
        """What guidance steers away from, as the reconstruction pipeline forms it: by default the empty prompt.

        Args:
            model, tokenizers: As in `encode_texts`.
            num_positions: `N` of the result; by default all positions of the text encoder, and in families with a
                pooled state, whose pipeline needs equal lengths, the number of caption embeddings.

        Returns:
            Of one row, `(1, N, d_cond)`.
        """
        config: Any = getattr(model, "module", model).config
        if num_positions is None and self.pooled_conditioning:
            num_positions = config.num_query_tokens
        return self.encode_texts(model, tokenizers, [""], device, num_positions)

    @property
    def timestep_range(self) -> tuple[int, int]:
        """The lowest and the highest training timestep."""
        return self.min_timestep, self.max_timestep

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

    def enable_gradient_checkpointing(self) -> None:
        """Makes the denoiser recompute its activations in the backward pass instead of storing them."""
        self.denoiser.enable_gradient_checkpointing()

    @torch.no_grad()
    def encode_moments(self, pixels: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, H, W)` in -1..1 to mean and log-variance of their latents, `(B, 2 * C, h, w)`."""
        if self.vae.encoder is None:
            raise ValueError("the autoencoder's encoder has been removed; load the model anew to encode images")
        if pixels.ndim != 4 or pixels.shape[2] % self.size_multiple or pixels.shape[3] % self.size_multiple:
            raise ValueError(
                f"pixels must be (batch, 3, height, width) with sides divisible by {self.size_multiple}, "
                f"got {tuple(pixels.shape)}"
            )
        with torch.autocast(pixels.device.type, enabled=False):
            return self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.parameters

    @torch.no_grad()
    def sample_latents(
        self, moments: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> torch.Tensor:
        """Scaled latents `(B, C, h, w)`, float32, sampled from the posterior with the given moments.

        Args:
            moments: `(B, 2 * C, h, w)`, as `encode_moments` returns them.
            generator: Of the random numbers: one, or one for each image.
        """
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        latents = DiagonalGaussianDistribution(moments).sample(generator)  # (B, C, h, w)
        return (latents.float() - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor

    def moments_shape(self, image_size: int) -> tuple[int, ...]:
        """`(2 * C, h, w)` of a square image of `image_size` pixels a side."""
        side = image_size // self.scale_factor
        return 2 * self.vae.config.latent_channels, side, side

    def image_encoder_parts(self) -> tuple[nn.Module | None, ...]:
        """The modules that only `encode_moments` uses."""
        return self.vae.encoder, self.vae.quant_conv

    def remove_image_encoder(self) -> None:
        """Frees `image_encoder_parts`. Latents can then be sampled from known moments, and decoded."""
        self.vae.encoder = self.vae.quant_conv = None

    def encode_images(
        self, pixels: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> torch.Tensor:
        """Images `(B, 3, H, W)` in -1..1 to scaled latents `(B, C, h, w)`, sampled from the posterior, float32.

        Args:
            generator: Of the random numbers: one, or one for each image.
        """
        return self.sample_latents(self.encode_moments(pixels), generator)

    def sample_timesteps(self, batch_size: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Random training timesteps `(B,)`, int64, on the CPU, as `timestep_sampling` says."""
        first, last = self.timestep_range
        if self.timestep_sampling == "uniform":
            return torch.randint(first, last + 1, (batch_size,), generator=generator)
        if self.timestep_sampling == "logit_normal":
            return logit_normal_timesteps(batch_size, first, last, generator)
        return stratified_timesteps(batch_size, first, last, generator)

    @abstractmethod
    def add_noise(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Noised latents, and what the denoiser is to predict from them, both `(B, C, h, w)`."""

    @abstractmethod
    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """The denoiser's output `(B, C, h, w)` for noised latents."""

    def loss_weights(self, timesteps: torch.Tensor) -> torch.Tensor | None:
        """The weight of each image's loss, `(B,)`, on the device of `timesteps`; None for equal weights."""
        return None

    def denoising_loss(
        self,
        latents: torch.Tensor,
        conditioning: torch.Tensor | Conditioning,
        noise: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss of `denoise`, a float32 scalar."""
        return self.denoise(latents, conditioning, noise, timesteps).loss

    def denoise(
        self,
        latents: torch.Tensor,
        conditioning: torch.Tensor | Conditioning,
        noise: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
    ) -> DenoisingOutput:
        """The error of the frozen denoiser's prediction for noised `latents` under `conditioning`.

        Args:
            latents: `(B, C, h, w)`, as `encode_images` returns them.
            conditioning: The loss has gradients with respect to it. A tensor `(B, N, d_cond)` is its hidden states.
            noise: Shape of `latents`; random by default.
            timesteps: `(B,)`; from `sample_timesteps` by default.
        """
        if isinstance(conditioning, torch.Tensor):
            conditioning = Conditioning(conditioning)
        if self.pooled_conditioning and conditioning.pooled is None:
            raise ValueError(f"a {self.title} reads pooled states as well; pass Conditioning(hidden_states, pooled)")
        if timesteps is None:
            timesteps = self.sample_timesteps(len(latents))
        timesteps = timesteps.to(latents.device)
        if noise is None:
            noise = torch.randn_like(latents)
        noisy, target = self.add_noise(latents, noise, timesteps)  # (B, C, h, w)
        predicted, target = self.predict(noisy, timesteps, conditioning).float(), target.float()
        weights = self.loss_weights(timesteps)
        if weights is not None:
            errors = self.loss(predicted, target, reduction="none").mean(dim=(1, 2, 3))  # (B,)
            return DenoisingOutput((weights * errors).mean(), errors.detach(), timesteps)
        with torch.no_grad():
            errors = self.loss(predicted, target, reduction="none").mean(dim=(1, 2, 3))
        return DenoisingOutput(self.loss(predicted, target), errors, timesteps)

    @abstractmethod
    def pipeline_components(self) -> dict[str, Any]:
        """The components of the reconstruction pipeline that this model provides: `models` and `scheduler`."""
