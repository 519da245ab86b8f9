"""Every figure of the miniature, measured on scenes that nothing but the judge has seen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from vlv import VLVForConditionalGeneration, VLVProcessor, hub
from vlv.pipelines import VLVReconstructionPipeline, load_reconstruction

from .autoencoder import measure_psnr, reconstruct_pixels
from .grammar import parse_caption
from .scene_classifier import SceneClassifier, measure_scene_classifier
from .scoring import score_scenes
from .teacher import prompt_alignment
from .training import SceneDataset

SPLITS = ("test", "combo")
SCENE_CLASSIFIER_FILE = "scene_classifier.safetensors"
GUIDANCE = (1.0, 2.0, 4.0)
SEED = 23  # of the scenes


def evaluation_items(split: str, n: int) -> tuple[torch.Tensor, list]:
    """Pictures `(n, 3, 64, 64)` uint8 and their scenes."""
    data = SceneDataset(n, split=split, seed=SEED, fields=("pixels", "scene"))
    items = [data[i] for i in range(n)]
    return torch.stack([item["pixels"] for item in items]), [item["scene"] for item in items]


def evaluate_miniature(folder: str | Path, record: Callable[[str, Any], None], n: int = 500, steps: int = 25) -> None:
    """Measures autoencoder, teacher, stage 1 and stage 2.

    Args:
        folder: The miniature, in the Hub's layout, with its scene_classifier.
        record: Called with the name of a part and its figures, as they come.
        n: Scenes of each split.
        steps: Denoising steps.
    """
    scene_classifier = SceneClassifier.load(Path(folder) / SCENE_CLASSIFIER_FILE)
    reconstruction = load_reconstruction(folder)
    reconstruction.set_progress_bar_config(disable=True)
    captioner, processor = hub.load_captioner(folder)
    record("settings", {"scenes of each split": n, "denoising steps": steps})
    for split in SPLITS:
        pixels, scenes = evaluation_items(split, n)
        record(f"judge on clean pictures, {split}", measure_scene_classifier(scene_classifier, split, n))
        rebuilt = torch.cat([reconstruct_pixels(reconstruction.vae, chunk) for chunk in pixels.split(64)])
        figures = {"psnr": round(measure_psnr(reconstruction.vae, split, n), 2)}
        record(f"autoencoder, {split}", figures | score_scenes(scene_classifier.read(rebuilt), scenes))
        for guidance in GUIDANCE:
            scores, _ = prompt_alignment(
                teacher_of(reconstruction),
                scene_classifier,
                split,
                n,
                guidance_scale=guidance,
                num_inference_steps=steps,
            )
            record(f"teacher's pictures of prompts, {split}, guidance {guidance:g}", scores)
        for guidance in GUIDANCE[:2]:
            drawn = reconstruct(reconstruction, pixels, guidance, steps)
            record(
                f"reconstructions, {split}, guidance {guidance:g}", score_scenes(scene_classifier.read(drawn), scenes)
            )
        captions = write_captions(captioner, processor, pixels)
        record(f"captions, {split}", score_scenes([parse_caption(c) for c in captions], scenes))


def teacher_of(pipeline: VLVReconstructionPipeline) -> StableDiffusionPipeline:
    """The teacher inside a reconstruction pipeline: its UNet and autoencoder with the encoder's own text encoder."""
    teacher = StableDiffusionPipeline(
        vae=pipeline.vae,
        text_encoder=pipeline.encoder.text_encoder,
        tokenizer=pipeline.tokenizer,
        unet=pipeline.unet,
        scheduler=pipeline.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    teacher.set_progress_bar_config(disable=True)
    return teacher


def reconstruct(
    pipeline: VLVReconstructionPipeline, pixels: torch.Tensor, guidance_scale: float, steps: int, batch_size: int = 64
) -> torch.Tensor:
    """Pictures `(n, 3, 64, 64)` uint8 through z and back, each from its own noise."""
    drawn = []
    for start in range(0, len(pixels), batch_size):
        batch = list(pixels[start : start + batch_size])
        pictures = pipeline(
            batch,
            guidance_scale=guidance_scale,
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(batch))],
            output_type="pt",
        ).images
        drawn.append((pictures * 255).round().to(torch.uint8))
    return torch.cat(drawn)


def write_captions(
    model: VLVForConditionalGeneration, processor: VLVProcessor, pixels: torch.Tensor, batch_size: int = 64
) -> list[str]:
    """Greedy captions."""
    captions: list[str] = []
    for chunk in pixels.split(batch_size):
        ids = model.generate(pixel_values=processor(images=chunk).pixel_values, max_new_tokens=64, do_sample=False)
        captions += processor.batch_decode(ids, skip_special_tokens=True)
    return captions
