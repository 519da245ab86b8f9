"""Builders of small, untrained components, and assertions that several tests share."""

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    ConvNextConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    Qwen2Config,
    SiglipVisionConfig,
    T5Config,
    T5EncoderModel,
    ViTConfig,
)

from vlv import VLVConfig, VLVModel

GOLDEN = Path(__file__).parent / "golden" / "original-a"
"""Checkpoints and values of the authors' code (tests/golden/README.md)."""

NOT_PACKAGED = shutil.ignore_patterns(".*", "build", "dist", "outputs", "runs", "tests", "__pycache__", "*.egg-info")
"""What a copy of the source, from which a wheel is built, does without."""

TEXT_WIDTH, POSITIONS, QUERIES, VOCABULARY = 32, 12, 8, 55
TEXT_2_WIDTH, POOLED_WIDTH = 48, 20  # of a second text encoder
TEXT_3_WIDTH = 96  # of a third one, and of the sequence that the transformer of a Stable Diffusion 3 reads
# Untrained models of the usual 0.02 hardly see their input: every image would have the same caption, and no test that
# compares captions could fail.
WEIGHT_SCALE = 0.3

IMAGE_ENCODER_CONFIG = {
    "vision_config": {
        "depths": (1, 1, 1, 1),
        "embed_dim": (16, 16, 32, 32),
        "num_heads": (2, 2, 4, 4),
        "num_groups": (2, 2, 4, 4),
        "patch_stride": (4, 2, 1, 1),
        "window_size": 4,
        "projection_dim": 24,
        "initializer_range": WEIGHT_SCALE,
    },
    "text_config": {
        "model_type": "bart",
        "vocab_size": 10,
        "d_model": 24,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 96,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "init_std": WEIGHT_SCALE,
    },
}


def text_encoder_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=TEXT_WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=POSITIONS,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )


def stable_diffusion_text_encoder() -> CLIPTextModel:
    """The same weights at each call: those of the model `stable_diffusion`, and of a VLV that was trained with it."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return CLIPTextModel(text_encoder_config()).eval()


def with_text_encoder(model: VLVModel) -> VLVModel:
    """The model with the text encoder of `stable_diffusion`, as training makes it."""
    model.text_encoder.load_state_dict(stable_diffusion_text_encoder().state_dict())
    return model


def language_model_config() -> Qwen2Config:
    return Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=40,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        initializer_range=WEIGHT_SCALE,
        tie_word_embeddings=True,
    )


def vlv_config(**overrides) -> VLVConfig:
    fields = {
        "image_encoder_config": IMAGE_ENCODER_CONFIG,
        "text_encoder_config": text_encoder_config(),
        "num_query_tokens": QUERIES,
        "task_prompt_ids": [0, 5, 2],
        "initializer_range": WEIGHT_SCALE,
    }
    return VLVConfig(**{**fields, **overrides})


def stable_diffusion_parts(prediction_type: str = "epsilon", **scheduler) -> dict:
    torch.manual_seed(1)
    return {
        "vae": AutoencoderKL(
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
            mid_block_add_attention=False,
        ),
        "unet": UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=2,
            norm_num_groups=4,
        ),
        "scheduler": DDPMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type=prediction_type,
            clip_sample=False,
            **scheduler,
        ),
    }


def stable_diffusion_xl_parts(prediction_type: str = "epsilon") -> dict:
    """Components of a Stable-Diffusion-XL-type model: text encoders of width 32 and 48, a pooled state of width 20."""
    parts = stable_diffusion_parts(prediction_type)
    unet = parts["unet"].config
    torch.manual_seed(1)
    sizes = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + POOLED_WIDTH}
    return parts | {
        "unet": UNet2DConditionModel.from_config(
            unet, cross_attention_dim=TEXT_WIDTH + TEXT_2_WIDTH, addition_embed_type="text_time", **sizes
        ),
        "text_encoder": CLIPTextModel(text_encoder_config()),
        "text_encoder_2": CLIPTextModelWithProjection(text_encoder_2_config()),
    }


def stable_diffusion_3_parts() -> dict:
    """Components of a Stable-Diffusion-3-type model: text encoders of width 32, 48 and 96, pooled states of 2 x 20."""
    torch.manual_seed(1)
    text_encoder = text_encoder_config()
    text_encoder.update({"projection_dim": POOLED_WIDTH})
    return {
        "vae": AutoencoderKL.from_config(
            stable_diffusion_parts()["vae"].config,
            latent_channels=16,
            scaling_factor=1.5,
            shift_factor=0.1,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        "transformer": SD3Transformer2DModel(
            sample_size=8,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=TEXT_3_WIDTH,
            caption_projection_dim=16,
            pooled_projection_dim=2 * POOLED_WIDTH,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "text_encoder": CLIPTextModelWithProjection(text_encoder),
        "text_encoder_2": CLIPTextModelWithProjection(text_encoder_2_config()),
        "text_encoder_3": T5EncoderModel(
            T5Config(
                vocab_size=VOCABULARY, d_model=TEXT_3_WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=2, pad_token_id=0
            )
        ),
    }


def text_encoder_2_config() -> CLIPTextConfig:
    config = text_encoder_config()
    config.update({"hidden_size": TEXT_2_WIDTH, "projection_dim": POOLED_WIDTH, "num_hidden_layers": 3})
    return config


def assert_close_to_scale(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Asserts that two tensors differ by at most `tolerance` times the largest absolute value of `expected`.

    Kernels of different processors add numbers in different orders, so the error of an element depends on the scale of
    the tensor, not on the element. float32 has about 1e-7 per operation; 1e-5 leaves room for a hundred of them.
    """
    assert got.shape == expected.shape, f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    got, expected = got.detach().double(), expected.detach().double()
    scale = expected.abs().max().item()
    worst = (got - expected).abs().max().item()
    assert worst <= tolerance * scale, f"differs by {worst:.3g}; {tolerance:g} x {scale:.3g} is allowed"


def backbone_configs() -> dict[str, Any]:
    """Small vision backbones by family, for images of 32 x 32 pixels with 4 x 4 patches."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    shape["initializer_range"] = WEIGHT_SCALE
    feed_forward = {"intermediate_size": 48}
    return {
        "siglip": SiglipVisionConfig(**shape, **feed_forward),
        "clip": CLIPVisionConfig(**shape, **feed_forward, initializer_factor=WEIGHT_SCALE / 0.02),
        "vit": ViTConfig(**shape, **feed_forward),
        "dinov2": Dinov2Config(**shape, mlp_ratio=2),
        "dinov2_with_registers": Dinov2WithRegistersConfig(**shape, mlp_ratio=2, num_register_tokens=3),
        "dinov3": DINOv3ViTConfig(**shape, **feed_forward, num_register_tokens=4),
        "convnext": ConvNextConfig(num_stages=2, depths=[1, 1], hidden_sizes=[8, 16], image_size=32),
    }


QUERY_DECODER_CONFIG = {"d_model": 24, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 48}
