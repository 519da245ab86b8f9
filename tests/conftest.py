"""Real components, built small: what the tests run on."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded; a test that needs a hub starts one

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, Qwen2Config, Qwen2ForCausalLM

from vlv import VLVConfig, VLVForConditionalGeneration, VLVImageProcessor, VLVModel, VLVProcessor
from vlv.hub import convert
from vlv.miniature.tokenizer import build_tokenizer

torch.set_num_threads(1)

TEXT_WIDTH, POSITIONS, QUERIES, VOCABULARY = 32, 12, 8, 55
# Untrained models of the usual 0.02 hardly see their input: every image would have the same caption, and no test that
# compares captions could fail.
WEIGHT_SCALE = 0.3

ENCODER_CONFIG = {
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
        "image_encoder_config": ENCODER_CONFIG,
        "text_encoder_config": text_encoder_config(),
        "num_query_tokens": QUERIES,
        "task_prompt_ids": [0, 5, 2],
        "initializer_range": WEIGHT_SCALE,
    }
    return VLVConfig(**{**fields, **overrides})


@pytest.fixture
def encoder() -> VLVModel:
    torch.manual_seed(0)
    return VLVModel(vlv_config()).eval()


@pytest.fixture
def captioner() -> VLVForConditionalGeneration:
    torch.manual_seed(0)
    return VLVForConditionalGeneration(vlv_config(text_config=language_model_config())).eval()


@pytest.fixture(scope="session")
def image_processor() -> VLVImageProcessor:
    return VLVImageProcessor(size={"height": 64, "width": 64})


@pytest.fixture(scope="session")
def processor(image_processor) -> VLVProcessor:
    return VLVProcessor(image_processor, build_tokenizer(for_text_encoder=False))


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Eight different pictures of different shapes."""
    random = np.random.default_rng(0)
    shapes = [(64, 64), (40, 90), (90, 40), (64, 64), (33, 65), (128, 100), (64, 64), (20, 20)]
    return [
        Image.fromarray(
            np.kron(random.integers(0, 256, (h // 4 + 1, w // 4 + 1, 3)), np.ones((4, 4, 1))).astype("uint8")
        )
        for h, w in shapes
    ]


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


@pytest.fixture(scope="session")
def stable_diffusion(tmp_path_factory) -> Path:
    """A Stable-Diffusion-type model in diffusers' folder format."""
    folder = tmp_path_factory.mktemp("stable-diffusion")
    parts = stable_diffusion_parts()
    pipeline = StableDiffusionPipeline(
        **parts,
        text_encoder=CLIPTextModel(text_encoder_config()),
        tokenizer=build_tokenizer(for_text_encoder=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.tokenizer.model_max_length = POSITIONS
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def language_model(tmp_path_factory) -> Path:
    """A causal language model with its tokenizer."""
    folder = tmp_path_factory.mktemp("language-model")
    torch.manual_seed(2)
    Qwen2ForCausalLM(language_model_config()).save_pretrained(folder)
    build_tokenizer(for_text_encoder=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def stage1_checkpoint(tmp_path_factory, image_processor) -> Path:
    """An untrained encoder with its image processor."""
    folder = tmp_path_factory.mktemp("stage1")
    torch.manual_seed(3)
    VLVModel(vlv_config()).save_pretrained(folder)
    image_processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory, pictures) -> Path:
    """Sixteen images with captions as sidecars, in two folders."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(16):
        target = folder / ("a" if number % 2 else "b") / f"{number}.png"
        target.parent.mkdir(exist_ok=True)
        pictures[number % len(pictures)].rotate(90 * number).save(target)
        words = "a small dog" if number % 2 else "a large apple at the top left"
        target.with_suffix(".txt").write_text(words + "\n")
    return folder


GOLDEN = Path(__file__).parent / "golden" / "original-a"


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    """What the authors' code computed (tests/golden/README.md)."""
    return load_file(GOLDEN / "golden.safetensors")


@pytest.fixture(scope="session")
def golden_facts() -> dict:
    return json.loads((GOLDEN / "golden.json").read_text())


@pytest.fixture(scope="session")
def converted(tmp_path_factory) -> Path:
    """The authors' two checkpoints, converted."""
    folder = tmp_path_factory.mktemp("converted") / "vlv"
    parts = GOLDEN / "components"
    convert(
        folder,
        stage1=GOLDEN / "stage1",
        stage2=GOLDEN / "stage2",
        stable_diffusion=parts / "stable-diffusion",
        florence=parts / "Florence2large",
        language_model=parts / "qwen",
    )
    return folder
