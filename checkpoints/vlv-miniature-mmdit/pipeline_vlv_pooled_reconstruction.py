"""The reconstruction pipeline for text-to-image models that read a pooled state, too: Stable Diffusion XL, 3 and 3.5.

It computes the prompt embeddings; a pipeline of diffusers generates the images from them.
"""

import inspect
import json
import os
import shutil
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

PIPELINES = {"VLVReconstructionPipeline", "VLVPooledReconstructionPipeline"}
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")  # one for each text encoder of the model
EMPTY_POSITIONS = 256  # zeros in place of T5's states, as in diffusers' pipeline of Stable Diffusion 3


class VLVPooledReconstructionPipeline(DiffusionPipeline):
    r"""
    Reconstructs images from their caption embeddings with a frozen text-to-image model.

    Caption embeddings (`caption_embeds`, `z`) are what the encoder computes from an image. The encoder's text encoders
    turn them into prompt embeddings, `(B, N, d_cond)`, and pooled prompt embeddings, `(B, d_pooled)`; for a Stable
    Diffusion 3 they are arranged as its transformer reads them (`arrange_conditioning`). With these the pipeline of
    diffusers for the text-to-image model, `text_to_image`, generates images.

    Args:
        encoder (`VLVModel`): Computes caption embeddings from images, and holds the text encoders.
        image_processor (`VLVImageProcessor`): The captioner's, so that both see the same pixels.
        vae (`AutoencoderKL`): Decodes latents to pixels.
        scheduler: A scheduler of diffusers that fits the denoiser.
        unet (`UNet2DConditionModel`): The denoiser of a Stable Diffusion XL. Or give `transformer`.
        transformer (`SD3Transformer2DModel`): The denoiser of a Stable Diffusion 3 or 3.5.
        tokenizer, tokenizer_2, tokenizer_3: Those of the text encoders, for negative prompts.
        diffusion_model: Where the components are loaded from that are not given:
            `{"source": folder or repo id, "revision": commit or None}`. A training leaves such a model.
        force_zeros_for_empty_prompt (`bool`, *optional*, defaults to `True`): Of a Stable Diffusion XL: without a
            negative prompt, guidance steers away from zeros instead of from the empty prompt.
    """

    model_cpu_offload_seq = "encoder->unet->transformer->vae"
    _optional_components = ["vae", "unet", "transformer", "scheduler", *TOKENIZERS]  # noqa: RUF012
    # Module and class of each component that `from_pretrained` of this class loads itself instead of the code of the
    # repository. Empty where this file is that code.
    _own_components: ClassVar[dict[str, list[str]]] = {}

    def __init__(
        self,
        encoder: PreTrainedModel,
        image_processor: Any,
        vae: Any = None,
        scheduler: Any = None,
        unet: Any = None,
        transformer: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        tokenizer_2: PreTrainedTokenizerBase | None = None,
        tokenizer_3: PreTrainedTokenizerBase | None = None,
        diffusion_model: dict | None = None,
        force_zeros_for_empty_prompt: bool = True,
    ):
        super().__init__()
        parts = {"vae": vae, "scheduler": scheduler, "unet": unet, "transformer": transformer}
        parts |= dict(zip(TOKENIZERS, (tokenizer, tokenizer_2, tokenizer_3), strict=True))
        if diffusion_model is not None:
            source, revision = diffusion_model["source"], diffusion_model.get("revision")
            index = DiffusionPipeline.load_config(source, revision=revision)
            force_zeros_for_empty_prompt = index.get("force_zeros_for_empty_prompt", True)
            parts |= _load_missing(parts, index, source, revision, encoder)
        self.register_modules(encoder=encoder, image_processor=image_processor, **parts)
        self.register_to_config(force_zeros_for_empty_prompt=force_zeros_for_empty_prompt)
        self.vae_scale_factor = 2 ** (len(parts["vae"].config.block_out_channels) - 1) if parts["vae"] else 8
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
    def text_to_image(self) -> DiffusionPipeline:
        """The pipeline of diffusers that generates the images, with the components of this one."""
        parts = {"vae": self.vae, "scheduler": self.scheduler, "text_encoder": None, "text_encoder_2": None}
        parts |= {"tokenizer": self.tokenizer, "tokenizer_2": self.tokenizer_2}
        if self.transformer is not None:
            pipeline: Any = diffusers.StableDiffusion3Pipeline(
                transformer=self.transformer, text_encoder_3=None, tokenizer_3=self.tokenizer_3, **parts
            )
        else:
            pipeline = diffusers.StableDiffusionXLPipeline(
                unet=self.unet,
                force_zeros_for_empty_prompt=self.config.force_zeros_for_empty_prompt,
                add_watermarker=False,
                **parts,
            )
        pipeline.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        return pipeline

    @property
    def denoiser(self) -> Any:
        """The transformer or the UNet."""
        return self.unet if self.transformer is None else self.transformer

    @property
    def size_multiple(self) -> int:
        """Height and width in pixels are divisible by it."""
        return self.vae_scale_factor * (1 if self.transformer is None else self.transformer.config.patch_size)

    @property
    def default_size(self) -> int:
        """Height and width in pixels where none are given: the image processor's crop, else the denoiser's size."""
        crop = getattr(self.image_processor, "pre_crop_size", None)
        if crop and crop % self.size_multiple == 0:
            return crop
        size = self.denoiser.config.sample_size
        return (size if isinstance(size, int) else size[0]) * self.vae_scale_factor

    @torch.no_grad()
    def get_caption_embeds(self, image: Any) -> torch.Tensor:
        """Caption embeddings `(B, Q, d_text)` of one image or a list, of any kind that `VLVImageProcessor` takes."""
        pixel_values = self.image_processor(image, return_tensors="pt").pixel_values
        return self.encoder(pixel_values=pixel_values.to(self._execution_device, self.encoder.dtype)).caption_embeds

    @torch.no_grad()
    def encode_image(
        self,
        image: Any = None,
        caption_embeds: torch.Tensor | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        do_classifier_free_guidance: bool = True,
        **words: Any,
    ) -> dict[str, torch.Tensor]:
        """What a pipeline of diffusers for the same text-to-image model takes in place of a prompt.

        Args:
            image: One image or a list. Or give `caption_embeds` `(B, N, d_text)`.
            negative_prompt: One text or one for each image, padded or truncated to as many positions as the image and
                its words have. Without one it is the empty prompt, or zeros, as in the call.
            do_classifier_free_guidance: Whether the negative embeddings are computed.
            words: `prompt`, `image_tokens` and `prompt_first` of `add_prompt`.

        Returns:
            `prompt_embeds` `(B, N, d_cond)` and `pooled_prompt_embeds` `(B, d_pooled)`, and with guidance
            `negative_prompt_embeds` and `negative_pooled_prompt_embeds` of the same shapes.
        """
        if (image is None) == (caption_embeds is None):
            raise ValueError("pass either image or caption_embeds, and not both")
        embeds = self.get_caption_embeds(image) if caption_embeds is None else caption_embeds
        rows = self.add_prompt(embeds, **words)  # (B, N, d_text)
        prompt_embeds, pooled = self.encode_caption_embeds(rows)
        if words.get("prompt") is not None:
            pooled = self._pool_words(rows, embeds.shape[1], **words)
        encoded = {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}
        if do_classifier_free_guidance:
            if negative_prompt is None and self.transformer is None and self.config.force_zeros_for_empty_prompt:
                negative = torch.zeros_like(prompt_embeds), torch.zeros_like(pooled)
            else:
                negative = self.encode_prompt(negative_prompt or "", rows.shape[1])
            for name, values in zip(list(encoded), negative, strict=True):
                encoded[f"negative_{name}"] = values.repeat_interleave(len(rows) // len(values), dim=0)
        return encoded

    @torch.no_grad()
    def add_prompt(
        self,
        caption_embeds: torch.Tensor,
        prompt: str | Sequence[str] | None = None,
        image_tokens: int | None = None,
        prompt_first: bool = False,
    ) -> torch.Tensor:
        """Leading caption embeddings, and words beside them, for the text encoders' input.

        Args:
            caption_embeds: `(B, Q, d_text)`.
            prompt: One text, or one for each image.
            image_tokens: How many caption embeddings are kept, from the front: 0 for the words alone. Default: all.
            prompt_first: Whether the words come before the caption embeddings, not after them.

        Returns:
            `(B, image_tokens, d_text)`; with words `(B, positions, d_text)`, padded as a prompt is.

        Raises:
            ValueError: If a number does not fit, the words have no room, or the pipeline lacks a tokenizer.
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
        prompts = [prompt] * count if isinstance(prompt, str) else list(prompt)
        if len(prompts) != count:
            raise ValueError(f"{len(prompts)} prompts for {count} images; give one, or one for each image")
        widths = [config.hidden_size for config in self.encoder.config.text_encoder_configs]
        parts = caption_embeds[:, :kept].split(widths, dim=2)  # of each text encoder
        encoders = zip(TOKENIZERS, self.encoder.text_encoders, parts, strict=False)
        return torch.cat([self._add_words(prompts, *encoder, prompt_first) for encoder in encoders], dim=2)

    def _add_words(
        self, prompts: Sequence[str], name: str, text_encoder: Any, caption_embeds: torch.Tensor, prompt_first: bool
    ) -> torch.Tensor:
        """The input `(B, positions, width)` of one text encoder.

        Args:
            name: Of its tokenizer.
            caption_embeds: Its part of those that are kept, `(B, image_tokens, width)`.
        """
        tokenizer, kept, positions = (
            getattr(self, name),
            caption_embeds.shape[1],
            self.encoder.config.num_text_positions,
        )
        if tokenizer is None:
            raise ValueError(f"a prompt needs the tokenizers of all text encoders, and this pipeline has no {name}")
        lengths = [len(ids) for ids in tokenizer(prompts).input_ids]  # with BOS and EOS
        if kept + max(lengths) > positions:
            raise ValueError(
                f"{kept} caption embeddings and {max(lengths)} tokens of the prompt do not fit the text encoders' "
                f"{positions} positions; shorten the prompt, or keep fewer embeddings (image_tokens)"
            )
        ids = tokenizer(prompts, padding="max_length", max_length=positions, return_tensors="pt").input_ids
        table = text_encoder.get_input_embeddings()
        words = table(ids.to(table.weight.device)).to(caption_embeds)  # (B, positions, width)
        has_bos = bool((ids[:, 0] == tokenizer.bos_token_id).all()) if tokenizer.bos_token_id is not None else False
        start = int(has_bos and kept > 0)
        rows = []
        for row, z, length in zip(words, caption_embeds, lengths, strict=True):
            # The words have no BOS after the image; before it, their EOS follows the image.
            before, after = (row[: length - 1], row[length - 1 :]) if prompt_first else (row[:0], row[start:])
            rows.append(torch.cat([before, z, after])[:positions])
        return torch.stack(rows)

    def _pool_words(
        self,
        rows: torch.Tensor,
        available: int,
        prompt: str | Sequence[str],
        image_tokens: int | None = None,
        prompt_first: bool = False,
    ) -> torch.Tensor:
        """Pooled states `(B, d_pooled)` of caption embeddings with words: those at EOS, not at the last padding.

        Args:
            rows: What `add_prompt` returned for `available` caption embeddings of each image, `(B, N, d_text)`.
        """
        kept = available if image_tokens is None else image_tokens
        prompts = [prompt] * len(rows) if isinstance(prompt, str) else prompt
        without_bos = kept > 0 and not prompt_first
        ends = [kept + len(self.tokenizer(text).input_ids) - without_bos for text in prompts]
        # Attention is causal, so that the last state of the text up to EOS is that at EOS in the whole text.
        outputs = [self.encoder(caption_embeds=row[None, :end]) for row, end in zip(rows, ends, strict=True)]
        return torch.cat([output.pooled_conditioning for output in outputs])

    @torch.no_grad()
    def encode_caption_embeds(self, caption_embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt embeddings `(B, N, d_cond)` and pooled ones `(B, d_pooled)` of caption embeddings of an image."""
        output = self.encoder(caption_embeds=caption_embeds.to(self._execution_device, self.encoder.dtype))
        return self._prompt_embeds(output)

    @torch.no_grad()
    def encode_prompt(
        self, prompt: str | Sequence[str], max_length: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt embeddings `(B, N, d_cond)` and pooled ones `(B, d_pooled)` of texts, padded or truncated.

        Args:
            prompt: One text or a list.
            max_length: `N`; by default the text encoders' positions. The pooled ones are those of all positions.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        positions = self.encoder.config.num_text_positions
        tokenizers = [getattr(self, name) for name in TOKENIZERS[: len(self.encoder.config.text_encoder_configs)]]
        settings = {"padding": "max_length", "max_length": positions, "truncation": True, "return_tensors": "pt"}
        device = self._execution_device
        ids = [tokenizer(prompts, **settings).input_ids.to(device) for tokenizer in tokenizers]
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        key, kept = ([own.tolist() for own in ids], max_length, device, autocast), self._kept_prompt
        if kept is None or kept[0] != key:
            output = self.encoder(input_ids=ids)
            if max_length is not None and max_length < positions:
                pooled = output.pooled_conditioning  # that of the complete texts
                output = self.encoder(input_ids=[own[:, :max_length] for own in ids])
                output.pooled_conditioning = pooled
            embeds = self._prompt_embeds(output)
            if kept is None:
                return embeds
            self._kept_prompt = kept = key, embeds
        prompt_embeds, pooled = kept[1]
        return prompt_embeds.clone(), pooled.clone()

    def keep_prompt(self, keep: bool = True) -> None:
        """From here on, `encode_prompt` encodes the same text once. It does not see changes of the text encoders."""
        self._kept_prompt = (None, None) if keep else None

    def _prompt_embeds(self, output: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What `text_to_image` takes, from the output of the encoder."""
        states = output.conditioning
        if self.transformer is not None:
            states = arrange_conditioning(states, self.transformer.config.joint_attention_dim)
        return states, output.pooled_conditioning

    def mix_caption_embeds(self, caption_embeds: Sequence[torch.Tensor], lengths: Sequence[int]) -> torch.Tensor:
        """Joins the leading caption embeddings of several images (VLV paper, sec. 4.4, compositionality).

        Args:
            caption_embeds: Those of each image, `(1, Q, d_text)` or `(Q, d_text)`.
            lengths: For each image, the number of embeddings to keep from the front. Their sum is at least 1 and at
                most the text encoders' number of positions.

        Returns:
            `(1, sum(lengths), d_text)`, for the call's `caption_embeds`.

        Raises:
            ValueError: If there is not one length for each image, or the lengths do not fit.
        """
        positions = self.encoder.config.num_text_positions
        if len(caption_embeds) != len(lengths) or not caption_embeds:
            raise ValueError(f"{len(caption_embeds)} embeddings and {len(lengths)} lengths; give one length each")
        rows = [embeds[0] if embeds.ndim == 3 else embeds for embeds in caption_embeds]  # (Q, d_text)
        for row, length in zip(rows, lengths, strict=True):
            if not 0 <= length <= len(row):
                raise ValueError(f"cannot keep {length} of {len(row)} caption embeddings")
        if not 1 <= sum(lengths) <= positions:
            raise ValueError(f"the lengths sum to {sum(lengths)}; the text encoders have places for 1 to {positions}")
        return torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)])[None]

    def _decode_latents(self, latents: torch.Tensor, output_type: str) -> Any:
        """Images of latents `(B, C, h, w)`, decoded in the autoencoder's precision, whatever the denoiser's is."""
        config = self.vae.config
        latents = latents.to(self.vae.dtype) / config.scaling_factor + (config.shift_factor or 0.0)
        images = self.vae.decode(latents, return_dict=False)[0]
        return self.text_to_image.image_processor.postprocess(images, output_type=output_type)

    @torch.no_grad()
    def __call__(
        self,
        image: Any = None,
        caption_embeds: torch.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 2.0,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        prompt: str | Sequence[str] | None = None,
        image_tokens: int | None = None,
        prompt_first: bool = False,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        **kwargs: Any,
    ) -> Any:
        r"""
        Reconstructs images.

        Args:
            image:
                One image or a list, of any kind that `VLVImageProcessor` takes: PIL, path, URL, bytes, or array.
                Either this or `caption_embeds` is given.
            caption_embeds (`torch.Tensor` of shape `(B, N, d_text)`):
                Caption embeddings, as `get_caption_embeds` and `mix_caption_embeds` return them.
            height, width (`int`, *optional*, default to `default_size`):
                Size of the images in pixels.
            num_inference_steps (`int`, *optional*, defaults to 50):
                Number of denoising steps.
            guidance_scale (`float`, *optional*, defaults to 2.0):
                Scale of classifier-free guidance; 1 turns it off.
            negative_prompt (`str` or `list[str]`, *optional*):
                What guidance steers away from: one text, or one for each image. Without one it is the empty prompt,
                or zeros in a Stable Diffusion XL where `force_zeros_for_empty_prompt` is set. Ignored without
                guidance.
            num_images_per_prompt (`int`, *optional*, defaults to 1):
                Number of reconstructions of each image. They are next to each other in the output.
            prompt, image_tokens, prompt_first (*optional*):
                Words beside the image, and how many of its embeddings are kept: those of `add_prompt`.
            guidance_interval (`tuple[float, float]`, *optional*, defaults to all):
                The part of the steps with guidance (arXiv 2404.07724), from the first, 0, to the end, 1. Other steps
                compute one half of the batch.
            generator, latents, output_type, return_dict, kwargs:
                As in the call of `text_to_image`, such as `sigmas` and `callback_on_step_end`.

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple`: The images.

        Raises:
            ValueError: If arguments contradict each other or the model.
            TypeError: For an argument that `text_to_image` does not have.
        """
        if (image is None) == (caption_embeds is None):
            raise ValueError("pass either image or caption_embeds, and not both")
        height, width = height or self.default_size, width or self.default_size
        if height % self.size_multiple or width % self.size_multiple:
            raise ValueError(f"height and width must be divisible by {self.size_multiple}, got {height} x {width}")
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        if not 0 <= guidance_interval[0] < guidance_interval[1] <= 1:
            raise ValueError(f"guidance_interval must be two ascending numbers in 0..1, got {guidance_interval}")
        custom = next((kwargs[name] for name in ("timesteps", "sigmas") if kwargs.get(name) is not None), None)
        count = num_inference_steps if custom is None else len(custom)
        if not any(guidance_interval[0] <= step / count < guidance_interval[1] for step in range(count)):
            raise ValueError(f"guidance_interval {guidance_interval} contains none of {count} steps; widen it")
        if caption_embeds is None:
            caption_embeds = self.get_caption_embeds(image)  # (B, Q, d_text)
        batch_size = len(caption_embeds)
        if not isinstance(negative_prompt, str | None) and len(negative_prompt) not in (1, batch_size):
            raise ValueError(
                f"{len(negative_prompt)} negative prompts for {batch_size} images; give one, or one for each image"
            )
        words = {"prompt": prompt, "image_tokens": image_tokens, "prompt_first": prompt_first}
        embeds = self.encode_image(None, caption_embeds, negative_prompt, guidance_scale > 1, **words)
        # Not every pipeline of diffusers repeats the rows that it is given.
        embeds = {
            name: rows.to(self.denoiser.dtype).repeat_interleave(num_images_per_prompt, dim=0)
            for name, rows in embeds.items()
        }
        decoded_apart = output_type != "latent" and self.vae.dtype != self.denoiser.dtype
        text_to_image = self.text_to_image
        if guidance_scale > 1 and tuple(guidance_interval) != (0, 1):
            # The pipelines of diffusers prepare these before the first step, if guidance is on in it.
            names = [name for name in kwargs if name.startswith("negative_") or name == "skip_guidance_layers"]
            if guidance_interval[0] > 0 and (used := [name for name in names if kwargs[name] is not None]):
                raise ValueError(f"guidance_interval that begins after the first step does not go with {used[0]}")
            limited = _GuidanceInterval(guidance_interval, guidance_scale, embeds, kwargs)
            known = text_to_image._callback_tensor_inputs
            if unknown := [name for name in limited.names if name not in known]:
                raise ValueError(f"callback_on_step_end_tensor_inputs has to be in {known}, but found {unknown}")
            guidance_scale, kwargs["callback_on_step_end"] = limited.first_scale, limited
            kwargs["callback_on_step_end_tensor_inputs"] = known
        images = text_to_image(
            **embeds,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generator,
            latents=None if latents is None else latents.to(self.denoiser.dtype),
            output_type="latent" if decoded_apart else output_type,
            return_dict=False,
            **kwargs,
        )[0]
        if decoded_apart:
            images = self._decode_latents(images, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


class _GuidanceInterval:
    """Turns guidance of diffusers' pipelines on and off between steps, after the caller's own callback.

    Such a pipeline holds the rows of the negative and of the prompt in one tensor while guidance is on.

    Args:
        interval: As the call of the pipeline takes it.
        scale: Of guidance within the interval.
        embeds: As `encode_image` returns them, with the negative ones.
        kwargs: Arguments of the call, with its callback and the names of the tensors that this gets.
    """

    def __init__(
        self, interval: tuple[float, float], scale: float, embeds: dict[str, torch.Tensor], kwargs: dict[str, Any]
    ):
        self.interval, self.scale = interval, scale
        self.callback = kwargs.get("callback_on_step_end")
        names = kwargs.get("callback_on_step_end_tensor_inputs", ["latents"])
        self.names = getattr(self.callback, "tensor_inputs", names)
        self.negative = {
            "prompt_embeds": embeds["negative_prompt_embeds"],
            "pooled_prompt_embeds": embeds["negative_pooled_prompt_embeds"],  # of Stable Diffusion 3
            "add_text_embeds": embeds["negative_pooled_prompt_embeds"],  # of Stable Diffusion XL
        }
        self.is_on = interval[0] == 0
        self.first_scale = scale if self.is_on else 1.0

    def __call__(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if self.callback is not None:
            tensors |= self.callback(pipeline, step, timestep, {name: tensors[name] for name in self.names}) or {}
        if not self.is_on and pipeline.guidance_scale != 1:  # set by the caller's callback, for the interval
            self.scale, pipeline._guidance_scale = pipeline.guidance_scale, 1.0
        order = pipeline.scheduler.order  # evaluations of the denoiser in a step; the last step has one alone
        count = -(-pipeline.num_timesteps // order)
        guides = self.scale > 1 and self.interval[0] <= ((step + 1) // order) / count < self.interval[1]
        ended = self.is_on and pipeline.guidance_scale <= 1  # by the caller's callback
        if guides == self.is_on or ended:
            return tensors
        self.is_on = guides
        pipeline._guidance_scale = self.scale if guides else 1.0
        for name in set(pipeline._callback_tensor_inputs) - {"latents"}:
            rows = tensors[name]
            tensors[name] = torch.cat([self.negative.get(name, rows), rows]) if guides else rows.chunk(2)[1]
        return tensors


def arrange_conditioning(hidden_states: torch.Tensor, joint_width: int) -> torch.Tensor:
    """The sequence that the transformer of a Stable Diffusion 3 reads: the states of both CLIP, then those of T5.

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


def _load_missing(
    parts: dict[str, Any], index: dict[str, Any], source: str, revision: str | None, encoder: PreTrainedModel
) -> dict[str, Any]:
    """The components that are None and that a text-to-image model in diffusers' format has.

    Args:
        index: Its `model_index.json`.
        encoder: Its precision is that of the models. A tokenizer of a text encoder that it does not have is left out.
    """
    loaded: dict[str, Any] = {}
    unused = TOKENIZERS[len(encoder.config.text_encoder_configs) :]
    for name, part in parts.items():
        if part is not None or name in unused or index.get(name, [None])[0] is None:
            continue
        part_class = AutoTokenizer if name in TOKENIZERS else getattr(diffusers, index[name][1])
        is_model = issubclass(part_class, diffusers.ModelMixin)
        if not is_model and not issubclass(part_class, (diffusers.SchedulerMixin, AutoTokenizer)):
            raise ValueError(f"{source} names {index[name][1]} as its {name}; expected a part of diffusers")
        settings = {"torch_dtype": encoder.dtype, "use_safetensors": True} if is_model else {}
        loaded[name] = part_class.from_pretrained(source, subfolder=name, revision=revision, **settings)
    return loaded
