"""The reconstruction pipeline: from images, or their caption embeddings, to images by a frozen text-to-image model."""

import inspect
import json
import os
import shutil
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.guiders.guider_utils import rescale_noise_cfg
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

PIPELINES = {"VLVReconstructionPipeline", "VLVPooledReconstructionPipeline"}
Autoencoder: TypeAlias = (
    AutoencoderKL | diffusers.AsymmetricAutoencoderKL | diffusers.AutoencoderTiny | diffusers.ConsistencyDecoderVAE
)
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
StepEndCallback: TypeAlias = Callable[..., dict[str, Any] | None] | PipelineCallback | MultiPipelineCallbacks


class VLVReconstructionPipeline(DiffusionPipeline, StableDiffusionMixin):
    r"""
    Reconstructs images from their caption embeddings with the frozen text-to-image model.

    Caption embeddings (`caption_embeds`, `z`) are what the encoder computes from an image. Prompt embeddings
    (`prompt_embeds`, `T(z)`) are the output of the text encoder, on which the denoiser is conditioned. The call takes
    caption embeddings; callbacks see prompt embeddings.

    Args:
        encoder (`VLVModel`): Computes caption embeddings from images, and holds the text encoder.
        image_processor (`VLVImageProcessor`): The captioner's, so that both see the same pixels.
        vae (`AutoencoderKL`, or another autoencoder of diffusers for the same latents): Decodes latents to pixels.
        unet (`UNet2DConditionModel`): The denoiser.
        scheduler: Any discrete scheduler of diffusers.
        tokenizer: The text encoder's, for negative prompts and the empty prompt.
        diffusion_model: Where `vae`, `unet`, `scheduler` and `tokenizer` are loaded from if they are not given:
            `{"source": folder or repo id, "revision": commit or None}`. A training leaves such a model.
    """

    model_cpu_offload_seq = "encoder->unet->vae"
    _optional_components = ["vae", "unet", "scheduler", "tokenizer"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]  # noqa: RUF012
    # Module and class of each component that `from_pretrained` of this class loads itself instead of the code of the
    # repository. Empty where this file is that code.
    _own_components: ClassVar[dict[str, list[str]]] = {}

    def __init__(
        self,
        encoder: PreTrainedModel,
        image_processor: Any,
        vae: Autoencoder | None = None,
        unet: UNet2DConditionModel | None = None,
        scheduler: KarrasDiffusionSchedulers | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        diffusion_model: dict | None = None,
    ):
        super().__init__()
        parts = {"vae": vae, "unet": unet, "scheduler": scheduler, "tokenizer": tokenizer}
        if diffusion_model is not None:
            missing = [name for name, part in parts.items() if part is None]
            parts |= _load_parts(missing, diffusion_model["source"], diffusion_model.get("revision"), encoder.dtype)
        self.register_modules(encoder=encoder, image_processor=image_processor, **parts)
        vae = parts["vae"]
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 8
        self.vae_image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._kept_prompt: tuple[Any, Any] | None = None  # the last text and its embeddings, where they are kept

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        """`model_index.json`, where the pipeline's class is this one instead of one that the repository defines."""
        index = super()._dict_from_json_file(json_file)
        if isinstance(index.get("_class_name"), list):  # diffusers would run the file that it names
            if (name := index["_class_name"][1]) in PIPELINES - {base.__name__ for base in cls.__mro__}:
                raise ValueError(f"{json_file} is of a {name}; load it with {name}.from_pretrained")
            index["_class_name"] = cls.__name__
        return index

    @classmethod
    def load_config(cls, *args, **kwargs) -> Any:
        if __name__.startswith("vlv."):
            import_module(f"{__package__}.components")  # sets `_own_components`
        loaded = super().load_config(*args, **kwargs)
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        index.update({name: own for name, own in cls._own_components.items() if index.get(name, [None])[0]})
        return loaded

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Writes `model_index.json` and, beside it, the code that loading needs where this package is not installed.

        Part of `save_pretrained` and `push_to_hub`. Without it, `model_index.json` would name classes of this package.
        """
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        folder = Path(save_directory)
        index_file = folder / self.config_name
        index = json.loads(index_file.read_text(encoding="utf-8"))
        for name, component in ((None, self), ("encoder", self.encoder), ("image_processor", self.image_processor)):
            if component is not None:
                component_class = type(getattr(component, "_orig_mod", component))  # of a compiled model
                code = Path(inspect.getfile(component_class))
                index[name or "_class_name"] = [code.stem, component_class.__name__]
                copy = folder / (name or "") / code.name
                if code.resolve() != copy.resolve():
                    shutil.copyfile(code, copy)
        index_file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    @property
    def default_size(self) -> int:
        """Height and width in pixels where none are given: those of the image processor's crop, else the UNet's."""
        crop = getattr(self.image_processor, "pre_crop_size", None)
        if crop and crop % self.vae_scale_factor == 0:
            return crop
        size = self.unet.config.sample_size
        return (size if isinstance(size, int) else size[0]) * self.vae_scale_factor

    @property
    def guidance_scale(self) -> float:
        """The current scale of classifier-free guidance. A callback changes it by setting `_guidance_scale`."""
        return self._guidance_scale

    @property
    def guidance_rescale(self) -> float:
        return self._guidance_rescale

    @property
    def size_multiple(self) -> int:  # height and width in pixels are divisible by it
        return self.vae_scale_factor

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """The number of timesteps of the current call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the remaining steps are skipped. A callback asks for that by setting `_interrupt = True`."""
        return self._interrupt

    def check_inputs(
        self,
        image: Any,
        caption_embeds: torch.Tensor | None,
        height: int,
        width: int,
        num_inference_steps: int,
        timesteps: list[int] | None,
        sigmas: list[float] | None,
        num_images_per_prompt: int,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        """Raises a `ValueError` for arguments of `__call__` that are wrong whatever the images are."""
        if (image is None) == (caption_embeds is None):
            raise ValueError("pass either image or caption_embeds, and not both")
        if height % self.vae_scale_factor or width % self.vae_scale_factor:
            raise ValueError(f"height and width must be divisible by {self.vae_scale_factor}, got {height} x {width}")
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        if timesteps is not None and sigmas is not None:
            raise ValueError("pass either timesteps or sigmas, not both")
        for name, values in (("timesteps", timesteps), ("sigmas", sigmas)):
            if values is not None and len(values) == 0:
                raise ValueError(f"{name} is empty; give at least one value, or leave it out")
            if values is not None and name not in inspect.signature(self.scheduler.set_timesteps).parameters:
                raise ValueError(f"{type(self.scheduler).__name__} does not take custom {name}; leave {name} out")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be at least 1, got {num_images_per_prompt}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; expected 'pil', 'np', 'pt' or 'latent'")
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs may name {self._callback_tensor_inputs}, not {sorted(unknown)}"
            )
        start, end = guidance_interval
        if not 0 <= start < end <= 1:
            raise ValueError(f"guidance_interval must be two ascending numbers in 0..1, got {guidance_interval}")
        custom = sigmas if timesteps is None else timesteps
        count = num_inference_steps if custom is None else len(custom)
        if not any(start <= step / count < end for step in range(count)):
            raise ValueError(f"guidance_interval {guidance_interval} contains none of {count} steps; widen it")

    def check_batch_sizes(
        self,
        batch_size: int,
        num_images_per_prompt: int,
        generator: torch.Generator | list[torch.Generator] | None,
        negative_prompt: str | Sequence[str] | None,
    ) -> None:
        """Raises a `ValueError` if the number of generators or negative prompts does not fit `batch_size` images."""
        count = batch_size * num_images_per_prompt
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"{len(generator)} generators for {count} images; give one, or one for each image")
        if not isinstance(negative_prompt, str | None) and len(negative_prompt) not in (1, batch_size):
            raise ValueError(f"{len(negative_prompt)} negative prompts for {batch_size} images; give one, or one each")

    @torch.no_grad()
    def get_caption_embeds(self, image: Any) -> torch.Tensor:
        """Caption embeddings `(B, Q, d_text)` of one image or a list, of any kind that `VLVImageProcessor` takes."""
        pixel_values = self.image_processor(image, return_tensors="pt").pixel_values
        return self.encoder(pixel_values=pixel_values.to(self._execution_device, self.encoder.dtype)).caption_embeds

    def encode_image(
        self, image: Any = None, caption_embeds: torch.Tensor | None = None, negative_prompt: str = "", **words: Any
    ) -> dict[str, torch.Tensor]:
        """What a pipeline of diffusers for the same text-to-image model takes in place of a prompt.

        Args:
            image: One image or a list. Or give `caption_embeds` `(B, N, d_text)`.
            negative_prompt: Padded or truncated to as many positions as the image and its words have.
            words: `prompt`, `image_tokens` and `prompt_first` of `add_prompt`.

        Returns:
            `prompt_embeds` and `negative_prompt_embeds`, both `(B, N, d_text)`.
        """
        if (image is None) == (caption_embeds is None):
            raise ValueError("pass either image or caption_embeds, and not both")
        embeds = self.get_caption_embeds(image) if caption_embeds is None else caption_embeds
        embeds = self.encode_caption_embeds(self.add_prompt(embeds, **words))
        negative = self.encode_prompt(negative_prompt, embeds.shape[1]).expand(len(embeds), -1, -1)
        return {"prompt_embeds": embeds, "negative_prompt_embeds": negative}

    @torch.no_grad()
    def add_prompt(
        self,
        caption_embeds: torch.Tensor,
        prompt: str | Sequence[str] | None = None,
        image_tokens: int | None = None,
        prompt_first: bool = False,
    ) -> torch.Tensor:
        """Leading caption embeddings, and words beside them, for the text encoder's input.

        Args:
            caption_embeds: `(B, Q, d_text)`.
            prompt: One text, or one for each image.
            image_tokens: How many caption embeddings are kept, from the front: 0 for the words alone. Default: all.
            prompt_first: Whether the words come before the caption embeddings, not after them.

        Returns:
            `(B, image_tokens, d_text)`; with words `(B, positions, d_text)`, padded as a prompt is.

        Raises:
            ValueError: If a number does not fit, the words have no room, or the pipeline has no tokenizer.
        """
        if not isinstance(caption_embeds, torch.Tensor):
            raise ValueError(
                f"caption_embeds must be a tensor of get_caption_embeds, got {type(caption_embeds).__name__}"
            )
        count, available = caption_embeds.shape[:2]
        kept = available if image_tokens is None else image_tokens
        if not (prompt is None) <= kept <= available:
            raise ValueError(
                f"image_tokens is {kept}; expected {int(prompt is None)} to {available} (0 needs a prompt)"
            )
        if prompt is None:
            return caption_embeds[:, :kept]
        if self.tokenizer is None:
            raise ValueError("a prompt needs the text encoder's tokenizer, and this pipeline has none; pass tokenizer")
        prompts = [prompt] * count if isinstance(prompt, str) else list(prompt)
        if len(prompts) != count:
            raise ValueError(f"{len(prompts)} prompts for {count} images; give one, or one for each image")
        positions = self.encoder.config.text_encoder_config.max_position_embeddings
        lengths = [len(ids) for ids in self.tokenizer(prompts).input_ids]  # with BOS and EOS
        if kept + max(lengths) > positions:
            raise ValueError(
                f"{kept} caption embeddings and {max(lengths)} tokens of the prompt do not fit the text encoder's "
                f"{positions} positions; shorten the prompt, or keep fewer embeddings (image_tokens)"
            )
        ids = self.tokenizer(prompts, padding="max_length", max_length=positions, return_tensors="pt").input_ids
        table = self.encoder.text_encoder.get_input_embeddings()
        words = table(ids.to(table.weight.device)).to(caption_embeds)  # (B, positions, d_text)
        rows = []
        for row, z, length in zip(words, caption_embeds[:, :kept], lengths, strict=True):
            # The words have no BOS after the image; before it, their EOS follows the image.
            before, after = (row[: length - 1], row[length - 1 :]) if prompt_first else (row[:0], row[min(kept, 1) :])
            rows.append(torch.cat([before, z, after])[:positions])
        return torch.stack(rows)

    @torch.no_grad()
    def encode_prompt(self, prompt: str | Sequence[str], max_length: int | None = None) -> torch.Tensor:
        """Prompt embeddings `(B, positions, d_text)` of texts, padded or truncated; the first `max_length` of them."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        positions = self.encoder.config.text_encoder_config.max_position_embeddings
        settings = {"padding": "max_length", "max_length": positions, "truncation": True, "return_tensors": "pt"}
        ids, device = self.tokenizer(prompts, **settings).input_ids[:, :max_length], self._execution_device
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        key, kept = (ids.tolist(), device, autocast), self._kept_prompt
        if kept is not None and kept[0] == key:
            return kept[1].clone()
        embeds = self.encoder(input_ids=ids.to(device)).conditioning
        if kept is not None:
            self._kept_prompt = key, embeds.clone()
        return embeds

    def keep_prompt(self, keep: bool = True) -> None:
        """From here on, `encode_prompt` encodes the same text once. It does not see changes of the text encoder."""
        self._kept_prompt = (None, None) if keep else None

    @torch.no_grad()
    def encode_caption_embeds(self, caption_embeds: torch.Tensor) -> torch.Tensor:
        """Prompt embeddings `T(z)`, `(B, N, d_text)`, of caption embeddings of the same shape."""
        caption_embeds = caption_embeds.to(self._execution_device, self.encoder.dtype)
        return self.encoder(caption_embeds=caption_embeds).conditioning

    def mix_caption_embeds(self, caption_embeds: Sequence[torch.Tensor], lengths: Sequence[int]) -> torch.Tensor:
        """Joins the leading caption embeddings of several images (VLV paper, sec. 4.4, compositionality).

        Args:
            caption_embeds: Those of each image, `(1, Q, d_text)` or `(Q, d_text)`.
            lengths: How many of each image are kept, from the front; in sum 1 to the text encoder's positions.

        Returns:
            `(1, sum(lengths), d_text)`, for the call's `caption_embeds`.

        Raises:
            ValueError: If there is not one length for each image, or the lengths do not fit.
        """
        positions = self.encoder.config.text_encoder_config.max_position_embeddings
        if len(caption_embeds) != len(lengths) or not caption_embeds:
            raise ValueError(f"{len(caption_embeds)} embeddings and {len(lengths)} lengths; give one length each")
        rows = [embeds[0] if embeds.ndim == 3 else embeds for embeds in caption_embeds]  # (Q, d_text)
        for row, length in zip(rows, lengths, strict=True):
            if not 0 <= length <= len(row):
                raise ValueError(f"cannot keep {length} of {len(row)} caption embeddings")
        if not 1 <= sum(lengths) <= positions:
            raise ValueError(f"the lengths sum to {sum(lengths)}; the text encoder has places for 1 to {positions}")
        return torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)])[None]

    def prepare_latents(
        self,
        batch_size: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Initial noise `(B, C, h, w)`, scaled as the scheduler expects it.

        Args:
            height, width: Of the images, in pixels.
            latents: Standard normal noise to use instead of noise from `generator`.

        Raises:
            ValueError: If `latents` has another shape.
        """
        factor = self.vae_scale_factor
        shape = (batch_size, self.unet.config.in_channels, height // factor, width // factor)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents must be {shape}, got {tuple(latents.shape)}")
        return latents.to(device=device, dtype=dtype) * self.scheduler.init_noise_sigma

    def prepare_extra_step_kwargs(
        self, generator: torch.Generator | list[torch.Generator] | None, eta: float
    ) -> dict[str, Any]:
        """Those of `eta` and `generator` that the scheduler's `step` accepts; schedulers differ in that."""
        accepted = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in (("eta", eta), ("generator", generator)) if name in accepted}

    def predict_noise(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor | None,
        guided: bool = True,
    ) -> torch.Tensor:
        """The denoiser's output `(B, C, h, w)` at one timestep, with classifier-free guidance if that is on.

        Args:
            latents: `(B, C, h, w)`.
            prompt_embeds: `(B, N, d_text)`.
            negative_prompt_embeds: `(B, M, d_text)`, or None where guidance is off. `M` may differ from `N`.
            guided: False for a timestep without guidance.

        Raises:
            ValueError: If guidance is on and there are no negative prompt embeddings.
        """
        latents = self.scheduler.scale_model_input(latents, timestep)

        def predict(latents: torch.Tensor, embeds: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            return self.unet(latents, timestep, embeds, encoder_attention_mask=mask, return_dict=False)[0]

        if not (guided and self.do_classifier_free_guidance):
            return predict(latents, prompt_embeds)
        if negative_prompt_embeds is None:
            raise ValueError(
                "a callback turned guidance on, but there are no negative_prompt_embeds; call the pipeline with "
                "guidance_scale > 1, or return negative_prompt_embeds from the callback"
            )
        rows = [*negative_prompt_embeds, *prompt_embeds]  # 2 B of (M, d_text) or (N, d_text)
        embeds, mask = pad_sequence(rows, batch_first=True), None  # (2 B, max(M, N), d_text)
        if negative_prompt_embeds.shape[1] != prompt_embeds.shape[1]:
            mask = pad_sequence([row.new_ones(len(row)) for row in rows], batch_first=True)  # (2 B, max(M, N))
        noise_pred_uncond, noise_pred_text = predict(torch.cat([latents] * 2), embeds, mask).chunk(2)
        noise_pred = noise_pred_uncond + self.guidance_scale * (noise_pred_text - noise_pred_uncond)
        if self.guidance_rescale > 0.0:
            noise_pred = rescale_noise_cfg(noise_pred, noise_pred_text, self.guidance_rescale)
        return noise_pred

    @torch.no_grad()
    def __call__(
        self,
        image: Any = None,
        caption_embeds: torch.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 2.0,
        guidance_rescale: float = 0.0,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepEndCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        prompt: str | Sequence[str] | None = None,
        image_tokens: int | None = None,
        prompt_first: bool = False,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> Any:
        r"""
        Reconstructs images.

        Args:
            image: One image or a list, of any kind that `VLVImageProcessor` takes: PIL, path, URL, bytes, or array.
                Either this or `caption_embeds` is given.
            caption_embeds (`torch.Tensor` of shape `(B, N, d_text)`): Caption embeddings, as `get_caption_embeds` and
                `mix_caption_embeds` return them. They are not diffusers' `prompt_embeds`: the pipeline passes them
                through the text encoder.
            height, width (`int`, *optional*, default to `default_size`): Size of the images in pixels.
            num_inference_steps (`int`, *optional*, defaults to 50): Denoising steps; the default is the authors'.
            timesteps (`list[int]`, *optional*): Custom timesteps, descending, for schedulers that take them.
            sigmas (`list[float]`, *optional*): Custom noise levels, descending, for schedulers that take them.
            guidance_scale (`float`, *optional*, defaults to 2.0, the authors'): Guidance; 1 turns it off.
            guidance_rescale (`float`, *optional*, defaults to 0.0): 0 to 1, against over-exposure (arXiv 2305.08891).
            negative_prompt (`str` or `list[str]`, *optional*, defaults to the empty prompt): What guidance steers away
                from: one text, or one for each image. Ignored without guidance.
            num_images_per_prompt (`int`, *optional*, defaults to 1): Images of each image, next to each other.
            eta (`float`, *optional*, defaults to 0.0): DDIM's eta; other schedulers ignore it.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Makes the noise reproducible. With
                one generator for each generated image, an image does not depend on the others in its batch.
            latents (`torch.Tensor` of shape `(B, C, h, w)`, *optional*): Initial noise instead of `generator`'s.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"` (`(B, H, W, 3)` in 0..1), `"pt"`
                (`(B, 3, H, W)` in 0..1) or `"latent"`.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return `ImagePipelineOutput` or a tuple.
            callback_on_step_end (`Callable`, `PipelineCallback`, `MultiPipelineCallbacks`, *optional*): Called as
                `callback(pipeline, step, timestep, callback_kwargs)` after each step. The tensors that it returns
                replace the pipeline's. It may set `_guidance_scale` and `_interrupt`, which skips the other steps.
            callback_on_step_end_tensor_inputs (`Sequence[str]`, *optional*, defaults to `("latents",)`): Names of the
                tensors in `callback_kwargs`: `"latents"`, `"prompt_embeds"` `(B, N, d_text)` and, separate from them,
                `"negative_prompt_embeds"` (`(B, M, d_text)`, or None). A `PipelineCallback` names its own.
            prompt, image_tokens, prompt_first (*optional*): Words beside the image, as in `add_prompt`.
            guidance_interval (`tuple[float, float]`, *optional*, defaults to all): The part of the steps with guidance
                (arXiv 2404.07724), from the first, 0, to the end, 1. Others compute one half of the batch.

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple`: The images.

        Raises:
            ValueError: If arguments contradict each other, the model or the scheduler.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. Check inputs
        height, width = height or self.default_size, width or self.default_size
        self.check_inputs(
            *(image, caption_embeds, height, width, num_inference_steps, timesteps, sigmas, num_images_per_prompt),
            *(output_type, callback_on_step_end_tensor_inputs, guidance_interval),
        )
        self._guidance_scale, self._guidance_rescale, self._interrupt = guidance_scale, guidance_rescale, False

        # 2. Encode the images
        if caption_embeds is None:
            caption_embeds = self.get_caption_embeds(image)  # (B, Q, d_text)
        caption_embeds = self.add_prompt(caption_embeds, prompt, image_tokens, prompt_first)  # (B, N, d_text)
        batch_size = len(caption_embeds)
        self.check_batch_sizes(batch_size, num_images_per_prompt, generator, negative_prompt)
        count = batch_size * num_images_per_prompt
        device, dtype = self._execution_device, self.unet.dtype

        # 3. Encode the caption embeddings and the negative prompt as prompt embeddings
        prompt_embeds = self.encode_caption_embeds(caption_embeds).to(dtype)
        prompt_embeds = prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)  # (count, N, d_text)
        negative_prompt_embeds = None
        if self.do_classifier_free_guidance:
            negative_prompt_embeds = self.encode_prompt(negative_prompt or "").to(dtype)  # (1 or B, positions, d_text)
            repeats = count // len(negative_prompt_embeds)
            negative_prompt_embeds = negative_prompt_embeds.repeat_interleave(repeats, dim=0)

        # 4. Prepare timesteps
        custom: dict[str, Any] = {k: v for k, v in (("timesteps", timesteps), ("sigmas", sigmas)) if v is not None}
        self.scheduler.set_timesteps(**(custom or {"num_inference_steps": num_inference_steps}), device=device)
        schedule = self.scheduler.timesteps  # more than the steps, where a step evaluates the denoiser more than once
        num_inference_steps = len(schedule) if custom else num_inference_steps

        # 5. Prepare latents and extra step kwargs
        latents = self.prepare_latents(count, height, width, dtype, device, generator, latents)
        extra_step_kwargs = self.prepare_extra_step_kwargs(generator, eta)

        # 6. Denoising loop
        order = self.scheduler.order
        count_steps = -(-len(schedule) // order)  # the last has one evaluation alone
        num_warmup_steps = len(schedule) - num_inference_steps * order
        self._num_timesteps = len(schedule)
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(schedule):
                if self.interrupt:
                    continue
                guided = guidance_interval[0] <= (i // order) / count_steps < guidance_interval[1]
                noise_pred = self.predict_noise(latents, t, prompt_embeds, negative_prompt_embeds, guided)
                latents = self.scheduler.step(noise_pred, t, latents, **extra_step_kwargs, return_dict=False)[0]

                if callback_on_step_end is not None:
                    callback_kwargs = {k: v for k, v in locals().items() if k in callback_on_step_end_tensor_inputs}
                    outputs = callback_on_step_end(self, i, t, callback_kwargs) or {}
                    latents = outputs.get("latents", latents)
                    prompt_embeds = _replaced_embeds(prompt_embeds, outputs.get("prompt_embeds", prompt_embeds))
                    negative_prompt_embeds = outputs.get("negative_prompt_embeds", negative_prompt_embeds)

                if i == len(schedule) - 1 or ((i + 1) > num_warmup_steps and (i + 1) % order == 0):
                    progress_bar.update()

        # 7. Decode the latents, and offload all models
        images = latents if output_type == "latent" else self.decode_latents(latents, output_type, generator)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def decode_latents(
        self,
        latents: torch.Tensor,
        output_type: str = "pil",
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Any:
        """Images of latents `(B, C, h, w)`.

        Args:
            output_type: `"pil"` for a list of PIL images, `"np"` for `(B, H, W, 3)` or `"pt"` for `(B, 3, H, W)`, both
                float in 0..1.
            generator: For autoencoders that draw noise, such as `ConsistencyDecoderVAE`.
        """
        config = self.vae.config
        latents = latents.to(self.vae.dtype) / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        images = self.vae.decode(latents, generator=generator).sample
        return self.vae_image_processor.postprocess(images, output_type=output_type)


def _replaced_embeds(prompt_embeds: torch.Tensor, returned: torch.Tensor) -> torch.Tensor:
    """The prompt embeddings `(B, N, d_text)` after a callback; raises `ValueError` for another number of rows.

    Those of diffusers that end guidance keep the last row or half of one tensor with negative and prompt embeddings.
    This pipeline keeps the negative embeddings apart, so `prompt_embeds` stays unchanged.
    """
    if len(returned) == len(prompt_embeds):
        return returned
    if 0 < len(returned) < len(prompt_embeds) and torch.equal(returned, prompt_embeds[-len(returned) :]):
        return prompt_embeds
    raise ValueError(
        f"the callback returned prompt_embeds of {len(returned)} rows for {len(prompt_embeds)} images; "
        "return one row for each image"
    )


def _load_parts(names: Sequence[str], source: str, revision: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """Components of a text-to-image model in diffusers' format: folder or repo id."""
    index = DiffusionPipeline.load_config(source, revision=revision)
    parts: dict[str, Any] = {}
    for name in names:
        part_class = AutoTokenizer if name == "tokenizer" else getattr(diffusers, index[name][1])
        is_model = issubclass(part_class, diffusers.ModelMixin)
        if not is_model and not issubclass(part_class, (diffusers.SchedulerMixin, AutoTokenizer)):
            raise ValueError(f"{source} names {index[name][1]} as its {name}; expected a part of diffusers")
        settings = {"torch_dtype": dtype, "use_safetensors": True} if is_model else {}
        parts[name] = part_class.from_pretrained(source, subfolder=name, revision=revision, **settings)
    return parts
