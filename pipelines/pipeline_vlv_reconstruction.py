"""From an image, or its caption embeddings, back to a picture: what the captioner understood, made visible."""

import inspect
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


class VLVReconstructionPipeline(DiffusionPipeline):
    r"""
    Reconstructs images from their caption embeddings with the frozen text-to-image model.

    Args:
        encoder (`VLVModel`): Turns images into caption embeddings; it holds the text encoder, too.
        vae (`AutoencoderKL`): From latents to pixels.
        unet (`UNet2DConditionModel`): The denoiser.
        scheduler: Any discrete diffusers scheduler.
        image_processor (`VLVImageProcessor`): The captioner's own, so that both see the same pixels.
        tokenizer: The text encoder's, for negative prompts and the empty one.
    """

    model_cpu_offload_seq = "encoder->unet->vae"
    _callback_tensor_inputs = ["latents", "conditioning", "negative_conditioning"]  # noqa: RUF012

    def __init__(
        self,
        encoder: PreTrainedModel,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        image_processor: Any,
        tokenizer: PreTrainedTokenizerBase,
    ):
        super().__init__()
        self.register_modules(
            encoder=encoder,
            vae=vae,
            unet=unet,
            scheduler=scheduler,
            image_processor=image_processor,
            tokenizer=tokenizer,
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 8
        self.vae_image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Part of saving and pushing: as diffusers', and beside it the code that strangers need to load this.

        diffusers would name classes of a package that they do not have.
        """
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        folder = Path(save_directory)
        index_file = folder / self.config_name
        index = json.loads(index_file.read_text(encoding="utf-8"))
        own = Path(inspect.getfile(type(self)))
        index["_class_name"] = [own.stem, type(self).__name__]
        _copy(own, folder)
        for name in ("encoder", "image_processor"):
            part = type(getattr(self, name))
            code = Path(inspect.getfile(part))
            index[name] = [code.stem, part.__name__]
            _copy(code, folder / name)
        index_file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def check_inputs(self, image, caption_embeds, height, width, callback_tensor_inputs, steps, output_type) -> None:
        if (image is None) == (caption_embeds is None):
            raise ValueError("pass either image or caption_embeds, and not both")
        if height % self.vae_scale_factor or width % self.vae_scale_factor:
            raise ValueError(f"height and width must be divisible by {self.vae_scale_factor}, got {height} x {width}")
        if steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {steps}")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type is {output_type!r}; expected 'pil', 'np', 'pt' or 'latent'")
        unknown = set(callback_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs may name {self._callback_tensor_inputs}, not {unknown}"
            )

    def check_counts(self, count: int, images: int, generator, negative_prompt) -> None:
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"{len(generator)} generators for {count} pictures; give one, or one each")
        if not isinstance(negative_prompt, str | None) and len(negative_prompt) not in (1, images):
            raise ValueError(
                f"{len(negative_prompt)} negative prompts for {images} pictures; give one, or one an image"
            )

    @torch.no_grad()
    def encode_image(self, image: Any) -> torch.Tensor:
        """Caption embeddings `(B, Q, d_text)` of one image or a list, of any kind that the image processor takes."""
        pixel_values = self.image_processor(image, return_tensors="pt").pixel_values
        return self.encoder(pixel_values=pixel_values.to(self._execution_device, self.encoder.dtype)).caption_embeds

    @torch.no_grad()
    def encode_prompt(self, prompt: str | Sequence[str]) -> torch.Tensor:
        """Conditioning `(B, positions, d_text)` of words, padded to all positions of the text encoder."""
        positions = self.encoder.config.text_encoder_config.max_position_embeddings
        words = [prompt] if isinstance(prompt, str) else list(prompt)
        ids = self.tokenizer(
            words, padding="max_length", max_length=positions, truncation=True, return_tensors="pt"
        ).input_ids
        return self.encoder(input_ids=ids.to(self._execution_device)).conditioning

    def mix_caption_embeds(self, embeds: Sequence[torch.Tensor], lengths: Sequence[int]) -> torch.Tensor:
        """Joins the first so many embeddings of several images (VLV paper, sec. 4.4, compositionality).

        Args:
            embeds: Of each image, `(1, Q, d_text)` or `(Q, d_text)`.
            lengths: How many of each to keep, from the front. Together at most the text encoder's positions.

        Returns:
            `(1, sum(lengths), d_text)`, for `caption_embeds`.
        """
        positions = self.encoder.config.text_encoder_config.max_position_embeddings
        if len(embeds) != len(lengths) or not embeds:
            raise ValueError(f"{len(embeds)} embeddings and {len(lengths)} lengths; give one length each")
        rows = [e[0] if e.ndim == 3 else e for e in embeds]  # (Q, d_text)
        for row, length in zip(rows, lengths, strict=True):
            if not 0 <= length <= len(row):
                raise ValueError(f"cannot keep {length} of {len(row)} caption embeddings")
        if not 1 <= sum(lengths) <= positions:
            raise ValueError(f"the lengths sum to {sum(lengths)}; the text encoder has places for 1 to {positions}")
        return torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)])[None]

    def prepare_latents(self, count, height, width, dtype, device, generator, latents) -> torch.Tensor:
        shape = (
            count,
            self.unet.config.in_channels,
            height // self.vae_scale_factor,
            width // self.vae_scale_factor,
        )
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents must be {shape}, got {tuple(latents.shape)}")
        return latents.to(device=device, dtype=dtype) * self.scheduler.init_noise_sigma

    def prepare_extra_step_kwargs(self, generator, eta: float) -> dict[str, Any]:
        accepted = inspect.signature(self.scheduler.step).parameters
        offered = {"eta": eta, "generator": generator}
        return {name: value for name, value in offered.items() if name in accepted}

    def predict(self, latents, timestep, conditioning, negative_conditioning, guidance_scale, guidance_rescale):
        """The denoiser's answer at one step, with classifier-free guidance where there is a negative conditioning."""
        inputs = self.scheduler.scale_model_input(latents, timestep)
        if negative_conditioning is None:
            return self.unet(inputs, timestep, encoder_hidden_states=conditioning, return_dict=False)[0]
        if negative_conditioning.shape == conditioning.shape:
            context = torch.cat([negative_conditioning, conditioning])  # (2 B, Q, d_text)
            both = self.unet(torch.cat([inputs] * 2), timestep, encoder_hidden_states=context, return_dict=False)[0]
            without, told = both.chunk(2)
        else:  # fewer queries than text positions: two calls
            without = self.unet(inputs, timestep, encoder_hidden_states=negative_conditioning, return_dict=False)[0]
            told = self.unet(inputs, timestep, encoder_hidden_states=conditioning, return_dict=False)[0]
        guided = without + guidance_scale * (told - without)
        if guidance_rescale > 0:  # sec. 3.4 of arXiv 2305.08891
            axes = list(range(1, told.ndim))
            matched = guided * (told.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True))
            guided = guidance_rescale * matched + (1 - guidance_rescale) * guided
        return guided

    @torch.no_grad()
    def __call__(
        self,
        image: Any = None,
        caption_embeds: torch.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 2.0,
        guidance_rescale: float = 0.0,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, torch.Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        r"""
        Args:
            image: One image or a list: PIL, path, bytes, or array, as `VLVImageProcessor` takes them.
            caption_embeds (`torch.Tensor` of shape `(B, N, d_text)`): Ready embeddings instead.
            height, width (`int`, *optional*): In pixels; by default the square that the images are
                cropped to, if they are, else what the UNet was trained for.
            num_inference_steps (`int`, *optional*, defaults to 50): As in the authors' code.
            guidance_scale (`float`, *optional*, defaults to 2.0): As in the authors' code; 1 is no guidance.
            guidance_rescale (`float`, *optional*, defaults to 0.0): 0..1, against over-exposure at high guidance.
            negative_prompt (`str` or `list[str]`, *optional*): Words to steer away from, instead of none.
            num_images_per_prompt (`int`, *optional*, defaults to 1): Pictures of each image, next to each other.
            eta (`float`, *optional*, defaults to 0.0): DDIM's, for schedulers that have it.
            generator (`torch.Generator` or a list, one for each picture): The same seed gives the same picture; with
                one each, a picture does not depend on those it is drawn with.
            latents (`torch.Tensor`, *optional*): The noise to start from.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            callback_on_step_end (`Callable`, *optional*): Called as `callback(pipeline, step, timestep, tensors)`;
                what it returns replaces `latents`, `conditioning` or `negative_conditioning`.
        """
        height = height or self._default_size()
        width = width or self._default_size()
        self.check_inputs(
            image,
            caption_embeds,
            height,
            width,
            callback_on_step_end_tensor_inputs,
            num_inference_steps,
            output_type,
        )
        if caption_embeds is None:
            caption_embeds = self.encode_image(image)
        count = len(caption_embeds) * num_images_per_prompt
        self.check_counts(count, len(caption_embeds), generator, negative_prompt)
        device, dtype = self._execution_device, self.unet.dtype

        embeds = caption_embeds.to(device, self.encoder.dtype)  # (B, N, d_text)
        conditioning = self.encoder(caption_embeds=embeds).conditioning.to(dtype)
        conditioning = conditioning.repeat_interleave(num_images_per_prompt, dim=0)  # (count, N, d_text)
        negative_conditioning = None
        if guidance_scale > 1:
            negative = self.encode_prompt(negative_prompt or "").to(dtype)
            negative_conditioning = negative.repeat_interleave(count // len(negative), dim=0)

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = self.prepare_latents(count, height, width, dtype, device, generator, latents)
        step_kwargs = self.prepare_extra_step_kwargs(generator, eta)
        with self.progress_bar(total=len(self.scheduler.timesteps)) as progress:
            for index, timestep in enumerate(self.scheduler.timesteps):
                predicted = self.predict(
                    latents, timestep, conditioning, negative_conditioning, guidance_scale, guidance_rescale
                )
                latents = self.scheduler.step(predicted, timestep, latents, **step_kwargs, return_dict=False)[0]
                if callback_on_step_end is not None:
                    state = {
                        "latents": latents,
                        "conditioning": conditioning,
                        "negative_conditioning": negative_conditioning,
                    }
                    asked = {name: state[name] for name in callback_on_step_end_tensor_inputs}
                    state.update(callback_on_step_end(self, index, timestep, asked) or {})
                    latents, conditioning = state["latents"], state["conditioning"]
                    negative_conditioning = state["negative_conditioning"]
                progress.update()

        pictures = latents if output_type == "latent" else self.decode_latents(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor, output_type: str = "pil"):
        """Latents `(B, C, h, w)` to pictures, as PIL images, `(B, H, W, 3)` numpy or `(B, 3, H, W)` torch in 0..1."""
        latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        return self.vae_image_processor.postprocess(self.vae.decode(latents).sample, output_type=output_type)

    def _default_size(self) -> int:
        """The square that the encoder was trained to rebuild, else the UNet's own size."""
        crop = getattr(self.image_processor, "pre_crop_size", None)
        if crop and crop % self.vae_scale_factor == 0:
            return crop
        size = self.unet.config.sample_size
        return (size if isinstance(size, int) else size[0]) * self.vae_scale_factor


def _copy(code: Path, folder: Path) -> None:
    if code.resolve() != (folder / code.name).resolve():
        shutil.copyfile(code, folder / code.name)
