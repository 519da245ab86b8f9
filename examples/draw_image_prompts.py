"""Writes docs/image_prompts.png: images from an image and words, and an image prompt in diffusers' image-to-image.

    python examples/draw_image_prompts.py docs/image_prompts.png

Upper row: an image, and what is generated from its first 24, 16, 12, 8, 4 and 0 caption embeddings with the words
`WORDS`. Lower row: another image, and what image-to-image makes of it with the caption embeddings of the first one, at
growing strength.
"""

import sys
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
from diffusers.utils import make_image_grid
from PIL import Image

from vlv.checkpoints import MINIATURE
from vlv.pipelines import VLVReconstructionPipeline, load_reconstruction

IMAGES = Path(__file__).parent / "images"
WORDS = "a large frog at the bottom left"
IMAGE_TOKENS = (24, 16, 12, 8, 4, 0)
STRENGTHS = (0.3, 0.5, 0.7, 0.8, 0.9, 1.0)
SIZE = 128  # of one image on the grid, in pixels


def image_to_image(pipeline: VLVReconstructionPipeline) -> StableDiffusionImg2ImgPipeline:
    """diffusers' pipeline with the components of the reconstruction pipeline."""
    return StableDiffusionImg2ImgPipeline(
        vae=pipeline.vae,
        unet=pipeline.unet,
        scheduler=DDIMScheduler.from_config(pipeline.scheduler.config),
        text_encoder=pipeline.encoder.text_encoder,
        tokenizer=pipeline.tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def main(output: str) -> None:
    image, canvas = (Image.open(IMAGES / name).convert("RGB") for name in ("test-1.png", "test-2.png"))
    pipeline = load_reconstruction(MINIATURE)

    def noise() -> torch.Generator:
        return torch.Generator().manual_seed(42)

    steps = {"num_inference_steps": 25, "guidance_scale": 2.0}
    cells = [image]
    for kept in IMAGE_TOKENS:
        cells += pipeline(image, prompt=WORDS, image_tokens=kept, generator=noise(), **steps).images
    cells.append(canvas)
    change, embeds = image_to_image(pipeline), pipeline.encode_image(image)
    for strength in STRENGTHS:
        cells += change(**embeds, image=canvas, strength=strength, generator=noise(), **steps).images
    cells = [cell.resize((SIZE, SIZE), Image.Resampling.NEAREST) for cell in cells]
    make_image_grid(cells, rows=2, cols=len(IMAGE_TOKENS) + 1).save(output, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:] or ["docs/image_prompts.png"])
