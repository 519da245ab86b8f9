"""The models and image files of three sizes. All weights but the miniature's are random."""

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import CLIPTextConfig, PreTrainedTokenizerFast, Qwen2Config

from vlv import VLVConfig, VLVForConditionalGeneration, VLVImageProcessor, VLVProcessor, hub
from vlv.checkpoints import MINIATURE
from vlv.diffusion_decoder import DiffusionDecoder, StableDiffusionDecoder, load_diffusion_decoder
from vlv.miniature.data import SceneDataset
from vlv.pipelines import VLVReconstructionPipeline, load_reconstruction

SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
CAPTION_TOKENS = (227, 30)
"""Mean and standard deviation of the length of the paper's captions (figure 8), between 120 and 300."""


@dataclass(frozen=True)
class Size:
    """What the parts of a model are made of.

    Attributes:
        width: Of Florence-2's transformer and of the text encoder.
        image_size: Side in pixels of the diffusion model's images.
        encoder_size: Side in pixels of the image encoder's input.
        vision: Widths and depths of the four stages of the vision tower.
        layers: Of Florence-2's encoder, of its decoder, and of the text encoder.
        language: Width, width of the feed-forward layers, layers and words of the language model.
        unet: Widths of the UNet's blocks.
        vae: Widths of the autoencoder's blocks.
        unet_layers: In each block of the UNet.
        queries: Caption embeddings of an image.
    """

    width: int
    image_size: int
    encoder_size: int
    vision: tuple[tuple[int, ...], tuple[int, ...]]
    layers: tuple[int, int, int]
    language: tuple[int, int, int, int]
    unet: tuple[int, ...]
    vae: tuple[int, ...]
    unet_layers: int = 2
    queries: int = 77


SIZES: dict[str, Size | None] = {
    "tiny": Size(
        width=64,
        image_size=64,
        encoder_size=96,
        vision=((16, 32, 48, 64), (1, 1, 1, 1)),
        layers=(2, 2, 2),
        language=(64, 128, 2, 512),
        unet=(32, 64),
        vae=(16, 16, 32, 32),
        unet_layers=1,
    ),
    "miniature": None,  # the embedded one, with its weights
    "medium": Size(
        width=256,
        image_size=192,
        encoder_size=384,
        vision=((48, 96, 192, 384), (1, 1, 3, 1)),
        layers=(4, 4, 6),
        language=(512, 1536, 8, 4096),
        unet=(64, 128, 192, 192),
        vae=(32, 64, 64, 64),
    ),
}


@dataclass
class Models:
    captioner: VLVForConditionalGeneration
    processor: VLVProcessor
    decoder: DiffusionDecoder
    pipeline: VLVReconstructionPipeline
    image_size: int
    name: str

    def describe(self) -> dict[str, float]:
        """Millions of parameters of each part."""
        encoder: Any = self.captioner.model
        parts = {
            "encoder": encoder,
            "language model": self.captioner.language_model,
            "denoiser": self.decoder.denoiser,
            "autoencoder": self.decoder.vae,
        }
        return {name: round(sum(p.numel() for p in part.parameters()) / 1e6, 2) for name, part in parts.items()}


def build(name: str, **changes: Any) -> Models:
    """The models of a size.

    Args:
        name: In `SIZES`.
        changes: Fields of its `Size` with other values.
    """
    size = SIZES[name]
    if size is None:
        captioner, processor = hub.load_captioner(MINIATURE)
        processor.image_processor.pre_crop_size = 64  # the authors' method crops
        decoder = load_diffusion_decoder(str(MINIATURE))
        pipeline: Any = load_reconstruction(str(MINIATURE))
        pipeline.image_processor = processor.image_processor
        return Models(captioner.eval(), processor, decoder, pipeline, 64, name)
    size = replace(size, **changes)
    torch.manual_seed(0)
    captioner = VLVForConditionalGeneration(_config(size)).eval()
    words = _tokenizer(size.language[3])
    image_processor = VLVImageProcessor(
        size={"height": size.encoder_size, "width": size.encoder_size}, pre_crop_size=size.image_size
    )
    processor = VLVProcessor(image_processor, words)
    scheduler = DDPMScheduler(**SCHEDULE)
    vae, unet = _diffusion_parts(size)
    decoder = StableDiffusionDecoder(vae, unet, dict(scheduler.config))
    pipeline = VLVReconstructionPipeline(
        encoder=captioner.model,
        image_processor=image_processor,
        vae=vae,
        unet=unet,
        scheduler=scheduler,
        tokenizer=_tokenizer(size.language[3], positions=77),
    )
    return Models(captioner, processor, decoder, pipeline, size.image_size, name)


def write_files(folder: Path, count: int, models: Models) -> list[Path]:
    """Image files of twice the model's size with captions beside them, of the paper's lengths or the miniature's own.

    The pictures are smooth random fields: a JPEG of noise alone would take longer to decode than a photograph.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    noise = np.random.default_rng(0)
    scenes = SceneDataset(count, fields=("caption",)) if models.name == "miniature" else None
    words = models.captioner.config.text_config.vocab_size - 4
    paths = []
    for number in range(count):
        path = folder / f"{number:05}.jpg"
        coarse = noise.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        side = 2 * models.image_size
        Image.fromarray(coarse).resize((side * 4 // 3, side), Image.Resampling.BICUBIC).save(path, quality=90)
        length = min(max(round(draw.gauss(*CAPTION_TOKENS)), 120), 300)
        random_caption = " ".join(f"w{draw.randrange(words)}" for _ in range(length))
        path.with_suffix(".txt").write_text(scenes[number]["caption"] if scenes else random_caption)
        paths.append(path)
    return paths


def _config(size: Size) -> VLVConfig:
    widths, depths = size.vision
    heads = [max(width // 24, 1) if width % 24 == 0 else max(width // 16, 1) for width in widths]
    florence = {
        "vision_config": {
            "depths": depths,
            "embed_dim": widths,
            "num_heads": heads,
            "num_groups": heads,
            "window_size": 12 if size.encoder_size % 12 == 0 else 8,
            "projection_dim": size.width,
            "drop_path_rate": 0.0,
        },
        "text_config": {
            "model_type": "bart",
            "vocab_size": 64,
            "d_model": size.width,
            "encoder_layers": size.layers[0],
            "decoder_layers": size.layers[1],
            "encoder_attention_heads": size.width // 32,
            "decoder_attention_heads": size.width // 32,
            "encoder_ffn_dim": 4 * size.width,
            "decoder_ffn_dim": 4 * size.width,
            "max_position_embeddings": 1024,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
            "pad_token_id": 1,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
        },
    }
    text_encoder = CLIPTextConfig(
        vocab_size=size.language[3],
        hidden_size=size.width,
        intermediate_size=4 * size.width,
        num_hidden_layers=size.layers[2],
        num_attention_heads=size.width // 32,
        max_position_embeddings=max(77, size.queries),
        bos_token_id=2,
        eos_token_id=3,
    )
    width, feed_forward, layers, vocabulary = size.language
    language_model = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=max(width // 256, 1),
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    return VLVConfig(
        image_encoder_config=florence,
        text_encoder_config=text_encoder,
        text_config=language_model,
        num_query_tokens=size.queries,
        task_prompt_ids=[0, *range(5, 17), 2],
    )


def _diffusion_parts(size: Size) -> tuple[AutoencoderKL, UNet2DConditionModel]:
    blocks = len(size.unet)
    unet = UNet2DConditionModel(
        sample_size=size.image_size // 8,
        block_out_channels=size.unet,
        layers_per_block=size.unet_layers,
        down_block_types=(*("CrossAttnDownBlock2D",) * (blocks - 1), "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * (blocks - 1)),
        cross_attention_dim=size.width,
        attention_head_dim=8,
        use_linear_projection=True,
    )
    vae = AutoencoderKL(
        block_out_channels=size.vae,
        down_block_types=("DownEncoderBlock2D",) * len(size.vae),
        up_block_types=("UpDecoderBlock2D",) * len(size.vae),
        layers_per_block=1,
        norm_num_groups=16,
        latent_channels=4,
        sample_size=size.image_size,
    )
    return vae, unet


def _tokenizer(vocabulary: int, positions: int | None = None) -> PreTrainedTokenizerFast:
    """Words w0, w1, ... as tokens; with `positions` it is the text encoder's, which begins and ends each text."""
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    words = {word: number for number, word in enumerate([*special, *(f"w{n}" for n in range(vocabulary - 4))])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    if positions is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="right" if positions else "left",
        model_max_length=positions or 2048,
    )
