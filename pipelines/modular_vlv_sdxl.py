"""Blocks for Modular Diffusers: image prompts for Stable Diffusion XL, and all that diffusers' blocks for it do."""

from typing import Any

from diffusers import SequentialPipelineBlocks, StableDiffusionXLAutoBlocks
from diffusers.modular_pipelines import ConfigSpec, OutputParam

from .modular_vlv import VLVImageEncoderBase, VLVImageSize
from .pipeline_vlv_pooled_reconstruction import VLVPooledReconstructionPipeline

TEXT_ENCODER = "text_encoder"  # the block of diffusers in whose place the image encoder stands
FORCE_ZEROS = "force_zeros_for_empty_prompt"


class VLVImageEncoder(VLVImageEncoderBase):
    """An image prompt for Stable Diffusion XL."""

    model_name = "stable-diffusion-xl"
    pipeline_class = VLVPooledReconstructionPipeline
    tokenizers = ("tokenizer", "tokenizer_2")
    embeds = (
        *("prompt_embeds", "negative_prompt_embeds"),
        *("pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
    )
    addition_embed_type = "text_time"

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        description = (
            "Whether guidance steers away from zeros, not the empty prompt, where there is no negative prompt"
        )
        return [ConfigSpec(FORCE_ZEROS, True, description)]

    def settings(self, components: Any) -> dict[str, Any]:
        return {FORCE_ZEROS: components.config[FORCE_ZEROS]}


class VLVBlocks(SequentialPipelineBlocks):
    """`StableDiffusionXLAutoBlocks` with an image, and words beside it, as the prompt."""

    _own = {"image_encoder": VLVImageEncoder, "image_size": VLVImageSize}  # noqa: RUF012
    _others = {  # noqa: RUF012
        name: block
        for name, block in zip(
            StableDiffusionXLAutoBlocks.block_names, StableDiffusionXLAutoBlocks.block_classes, strict=True
        )
        if name != TEXT_ENCODER
    }
    block_classes = [*_own.values(), *_others.values()]  # noqa: RUF012
    block_names = [*_own, *_others]  # noqa: RUF012

    @property
    def description(self) -> str:
        return (
            "Generates images from an image prompt, and words beside it, with Stable Diffusion XL; image-to-image, "
            "inpainting and ControlNet as in StableDiffusionXLAutoBlocks."
        )

    @property
    def outputs(self) -> list[OutputParam]:
        return [OutputParam.template("images")]
