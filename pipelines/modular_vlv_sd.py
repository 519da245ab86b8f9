"""Blocks for Modular Diffusers: image prompts for Stable Diffusion 1 and 2.

diffusers has no modular pipeline for these. Its denoising blocks for Stable Diffusion XL run their UNets, too: such a
UNet does not read the pooled state and the sizes that they pass.
"""

from typing import Any

import torch
from diffusers import ModularPipelineBlocks, SequentialPipelineBlocks, UNet2DConditionModel
from diffusers.modular_pipelines import ComponentSpec, InputParam, OutputParam, PipelineState
from diffusers.modular_pipelines.stable_diffusion_xl.before_denoise import (
    StableDiffusionXLPrepareLatentsStep,
    StableDiffusionXLSetTimestepsStep,
)
from diffusers.modular_pipelines.stable_diffusion_xl.decoders import StableDiffusionXLDecodeStep
from diffusers.modular_pipelines.stable_diffusion_xl.denoise import StableDiffusionXLDenoiseStep

from .modular_vlv import VLVImageEncoderBase, VLVImageSize
from .pipeline_vlv_reconstruction import VLVReconstructionPipeline


class VLVImageEncoder(VLVImageEncoderBase):
    """An image prompt for Stable Diffusion 1 and 2."""

    pipeline_class = VLVReconstructionPipeline
    tokenizers = ("tokenizer",)
    embeds = ("prompt_embeds", "negative_prompt_embeds")
    addition_embed_type = None


class VLVInputStep(ModularPipelineBlocks):
    """Repeats prompt embeddings for several images of each prompt, and says how many prompts there are."""

    @property
    def description(self) -> str:
        return "Repeats the prompt embeddings num_images_per_prompt times."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("unet", UNet2DConditionModel)]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam.template("num_images_per_prompt"),
            InputParam.template("prompt_embeds"),
            InputParam.template("negative_prompt_embeds"),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("batch_size", type_hint=int, description="The number of prompts"),
            OutputParam("dtype", type_hint=torch.dtype, description="Of the latents"),
            OutputParam.template("prompt_embeds"),
            OutputParam.template("negative_prompt_embeds"),
        ]

    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        block_state: Any = self.get_block_state(state)
        block_state.batch_size = len(block_state.prompt_embeds)
        block_state.dtype = block_state.prompt_embeds.dtype
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            if block_state[name] is not None:
                block_state[name] = block_state[name].repeat_interleave(block_state.num_images_per_prompt, dim=0)
        self.set_block_state(state, block_state)
        return components, state


class VLVBlocks(SequentialPipelineBlocks):
    """From an image, and words beside it, to images."""

    block_classes = [  # noqa: RUF012
        VLVImageEncoder,
        VLVImageSize,
        VLVInputStep,
        StableDiffusionXLSetTimestepsStep,
        StableDiffusionXLPrepareLatentsStep,
        StableDiffusionXLDenoiseStep,
        StableDiffusionXLDecodeStep,
    ]
    block_names = [  # noqa: RUF012
        *("image_encoder", "image_size", "input", "set_timesteps", "prepare_latents", "denoise", "decode"),
    ]

    @property
    def description(self) -> str:
        return "Generates images from an image prompt, and words beside it, with Stable Diffusion 1 or 2."

    @property
    def outputs(self) -> list[OutputParam]:
        return [OutputParam.template("images")]
