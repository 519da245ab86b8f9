"""Blocks for Modular Diffusers that the families of text-to-image models share: an image becomes prompt embeddings."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import ClassifierFreeGuidance, ModularPipelineBlocks
from diffusers.modular_pipelines import ComponentSpec, InputParam, OutputParam, PipelineState
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer


class VLVImageEncoderBase(ModularPipelineBlocks):
    """Prompt embeddings of images, with words beside them: what `encode_image` of the reconstruction pipeline returns.

    A subclass, `VLVImageEncoder`, fills in what depends on the family of text-to-image models.
    """

    pipeline_class: ClassVar[type]
    """The reconstruction pipeline, whose `encode_image` the block calls."""
    tokenizers: ClassVar[tuple[str, ...]]
    """Components: the tokenizers of the text encoders."""
    embeds: ClassVar[tuple[str, ...]]
    """What `encode_image` returns. Names that begin with `negative_` are None where the guider is off."""
    addition_embed_type: ClassVar[str | None]
    """Of the family's UNets."""

    @property
    def description(self) -> str:
        return "Encodes images, and words beside them, as prompt embeddings."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [
            ComponentSpec("encoder", AutoModel, description="The VLV's encoder, with the text encoders"),
            ComponentSpec("vlv_image_processor", AutoImageProcessor, description="The VLV's image processor"),
            *(ComponentSpec(name, AutoTokenizer, description="Of a text encoder") for name in self.tokenizers),
            ComponentSpec(
                "guider",
                ClassifierFreeGuidance,
                config={"guidance_scale": 2.0},  # the authors'
                default_creation_method="from_config",
            ),
        ]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam(
                "image_prompt",
                required=True,
                description="One image or a list: PIL images, paths, URLs, bytes or arrays.",
            ),
            InputParam("prompt", type_hint=str | list[str], description="Words: one text, or one for each image."),
            InputParam(
                "image_tokens",
                type_hint=int,
                description="How many caption embeddings of each image are kept, from the front: 0 for the words "
                "alone, by default all.",
            ),
            InputParam(
                "prompt_first",
                type_hint=bool,
                default=False,
                description="Whether the words come before the caption embeddings, not after them.",
            ),
            InputParam.template("negative_prompt"),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam(name, type_hint=torch.Tensor, kwargs_type="denoiser_input_fields") for name in self.embeds]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        block_state: Any = self.get_block_state(state)
        require_loaded(components, "encoder", "vlv_image_processor", *self.tokenizers)
        pipeline: Any = self.pipeline_class(
            encoder=components.encoder,
            image_processor=components.vlv_image_processor,
            **{name: getattr(components, name) for name in self.tokenizers},
            **self.settings(components),
        )
        given = {name: block_state[name] for name in ("prompt", "image_tokens", "negative_prompt")}
        given = {name: value for name, value in given.items() if value is not None}
        encoded = pipeline.encode_image(block_state.image_prompt, prompt_first=block_state.prompt_first, **given)
        unet = getattr(components, "unet", None)
        if unet is not None:
            self.check_unet(unet.config, encoded)
            encoded = {name: rows.to(unet.dtype) for name, rows in encoded.items()}
        for name in self.embeds:
            is_used = components.guider.num_conditions > 1 or not name.startswith("negative_")
            block_state[name] = encoded[name] if is_used else None
        self.set_block_state(state, block_state)
        return components, state

    def settings(self, components: Any) -> dict[str, Any]:
        """Settings of the reconstruction pipeline."""
        return {}

    def check_unet(self, config: Any, encoded: Mapping[str, torch.Tensor]) -> None:
        """Raises a `ValueError` if a UNet of this configuration does not read these prompt embeddings."""
        remedy = "load unet and vae from the text-to-image model that this VLV was trained with"
        if config.addition_embed_type != self.addition_embed_type:
            raise ValueError(
                f"the UNet is of another family of text-to-image models than this VLV: its addition_embed_type is "
                f"{config.addition_embed_type!r}, expected {self.addition_embed_type!r}; {remedy}"
            )
        read = {"prompt_embeds": config.cross_attention_dim}
        if config.addition_embed_type == "text_time":
            sizes = 6 * config.addition_time_embed_dim  # of six numbers: sizes of the image, and its crop
            read["pooled_prompt_embeds"] = config.projection_class_embeddings_input_dim - sizes
        for name, width in read.items():
            if width != encoded[name].shape[-1]:
                raise ValueError(
                    f"the UNet reads {name} of width {width}, and those of this VLV have {encoded[name].shape[-1]}; "
                    f"{remedy}"
                )


class VLVImageSize(ModularPipelineBlocks):
    """Height and width of the images where none are given, as in the reconstruction pipeline."""

    @property
    def description(self) -> str:
        return "Sets height and width to those that the VLV reconstructs, where none are given."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("vlv_image_processor", AutoImageProcessor)]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam.template("height"),
            InputParam.template("width"),
            InputParam.template("image", required=False, note="with one, the size is that of this image"),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam(name, type_hint=int) for name in ("height", "width")]

    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        block_state: Any = self.get_block_state(state)
        require_loaded(components, "unet", "vae", "scheduler")
        crop = getattr(components.vlv_image_processor, "pre_crop_size", None)
        if crop and block_state.image is None and crop % components.vae_scale_factor == 0:
            block_state.height = block_state.height or crop
            block_state.width = block_state.width or crop
        self.set_block_state(state, block_state)
        return components, state


def require_loaded(components: Any, *names: str) -> None:
    """Raises a `ValueError` that names components that are not loaded. diffusers only warns where loading fails."""
    if missing := [name for name in names if getattr(components, name, None) is None]:
        raise ValueError(
            f"{', '.join(missing)} of the pipeline are not loaded; call load_components(trust_remote_code=True), "
            "whose warnings name the reason where one could not be loaded"
        )
