"""All scores of the miniature, measured on scenes that no part but the scene classifier was trained on."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline

from vlv import VLVForConditionalGeneration, VLVProcessor, hub
from vlv.modeling_vlv import TEXT_ENCODERS
from vlv.pipelines import (
    ReconstructionPipeline,
    VLVReconstructionPipeline,
    generate_captions,
    generate_images,
    load_reconstruction,
)

from .autoencoder import measure_psnr, reconstruct_pixels
from .data import evaluation_items
from .folding import fold_empty_positions
from .grammar import parse_caption
from .instructions import INSTRUCTIONS, NONE, score_obedience
from .kept_images import KeptImages
from .scene_classifier import SceneClassifier, SceneClassifierFeatures, measure_scene_classifier
from .scoring import score_scenes
from .teacher import assemble_pipeline, measure_prompt_alignment
from .world import Scene

SPLITS = ("test", "combo")
SCENE_CLASSIFIER_FILE = "scene_classifier.safetensors"
TEACHER_GUIDANCE = (1.0, 2.0, 4.0)
RECONSTRUCTION_GUIDANCE = (1.0, 2.0)
MAX_NEW_TOKENS = 64


def evaluate_miniature(
    folder: str | Path,
    record: Callable[[str, Any], None],
    n: int = 500,
    steps: int = 25,
    images_dir: Path | None = None,
) -> None:
    """Measures the scene classifier, the autoencoder, the teacher, reconstructions and captions.

    Args:
        folder: A miniature in the Hub's layout, with its scene classifier.
        record: Called after each measurement with its name and its scores (for `"settings"`: with the settings).
        n: Number of scenes of each split.
        steps: Number of denoising steps.
        images_dir: Keeps originals, reconstructions and captions, see `KeptImages`; the scores of reconstructions then
            have their distances from the originals, too. Needs at least 2 scenes.

    Raises:
        FileNotFoundError: If `folder` has no scene classifier, or a part of the model is missing.
    """
    scene_classifier = SceneClassifier.load(Path(folder) / SCENE_CLASSIFIER_FILE)
    reconstruction = load_reconstruction(folder)
    reconstruction.set_progress_bar_config(disable=True)
    if not isinstance(reconstruction, VLVReconstructionPipeline) and reconstruction.transformer is not None:
        fold_empty_positions(reconstruction.transformer)
    teacher = teacher_pipeline(reconstruction)
    captioner, processor = hub.load_captioner(folder)
    record("settings", {"scenes of each split": n, "denoising steps": steps})
    for split in SPLITS:
        pixels, scenes = evaluation_items(split, n)
        kept = None if images_dir is None else KeptImages(images_dir / split, pixels, scenes)
        record(f"scene classifier on clean images, {split}", measure_scene_classifier(scene_classifier, split, n))
        decoded = torch.cat([reconstruct_pixels(reconstruction.vae, chunk) for chunk in pixels.split(64)])
        psnr = {"psnr": round(measure_psnr(reconstruction.vae, split, n), 2)}
        record(f"autoencoder, {split}", psnr | score_scenes(scene_classifier.predict_scenes(decoded), scenes))
        for guidance in TEACHER_GUIDANCE:
            scores, _ = measure_prompt_alignment(
                teacher, scene_classifier, split, n, guidance_scale=guidance, num_inference_steps=steps
            )
            record(f"teacher's images of prompts, {split}, guidance {guidance:g}", scores)
        for guidance in RECONSTRUCTION_GUIDANCE:
            images = reconstruct_images(reconstruction, pixels, guidance, steps)
            scores = score_scenes(scene_classifier.predict_scenes(images), scenes)
            if kept is not None:
                features = SceneClassifierFeatures(Path(folder) / SCENE_CLASSIFIER_FILE)
                scores |= kept.add_reconstructions(guidance, images, features)
            record(f"reconstructions, {split}, guidance {guidance:g}", scores)
        measure_captions(captioner, processor, split, pixels, scenes, record, kept)


def evaluate_captions(
    folder: str | Path, record: Callable[[str, Any], None], n: int = 500, images_dir: Path | None = None
) -> None:
    """Measures captions alone. Arguments are those of `evaluate_miniature`."""
    captioner, processor = hub.load_captioner(folder)
    record("settings", {"scenes of each split": n})
    for split in SPLITS:
        pixels, scenes = evaluation_items(split, n)
        kept = None if images_dir is None else KeptImages(images_dir / split, pixels, scenes)
        measure_captions(captioner, processor, split, pixels, scenes, record, kept)


def measure_captions(
    captioner: VLVForConditionalGeneration,
    processor: VLVProcessor,
    split: str,
    pixels: torch.Tensor,
    scenes: Sequence[Scene],
    record: Callable[[str, Any], None],
    kept: KeptImages | None = None,
) -> None:
    """Scores of captions, and of what the captioner writes for each instruction that it was trained to follow.

    Args:
        pixels: Images of the scenes, `(N, 3, 64, 64)` uint8.
        record: As in `evaluate_miniature`.
        kept: Keeps the captions without an instruction.
    """
    embeds = encode_images(captioner, processor, pixels)
    captions = caption_embeddings(captioner, processor, embeds)
    if kept is not None:
        kept.add_captions(captions)
    record(f"captions, {split}", score_scenes([parse_caption(caption) for caption in captions], scenes))
    followed = [
        instruction for instruction in INSTRUCTIONS if instruction.text in (captioner.config.instructions or [])
    ]
    if followed:
        record(f"no instruction, {split}", score_obedience(NONE, captions, scenes))
    for instruction in followed:
        texts = caption_embeddings(captioner, processor, embeds, instruction.text)
        record(f'"{instruction.text}", {split}', score_obedience(instruction, texts, scenes))


def teacher_pipeline(pipeline: ReconstructionPipeline) -> DiffusionPipeline:
    """The teacher as a text-to-image pipeline, from the components of a reconstruction pipeline."""
    if isinstance(pipeline, VLVReconstructionPipeline):
        return assemble_pipeline(
            pipeline.vae, pipeline.encoder.text_encoder, pipeline.unet, pipeline.tokenizer, pipeline.scheduler
        )
    teacher = pipeline.text_to_image
    teacher.register_modules(**dict(zip(TEXT_ENCODERS, pipeline.encoder.text_encoders, strict=False)))
    return teacher


def reconstruct_images(
    pipeline: ReconstructionPipeline, pixels: torch.Tensor, guidance_scale: float, steps: int, batch_size: int = 64
) -> torch.Tensor:
    """Reconstructions of images, both `(N, 3, 64, 64)` uint8. Image `i` has noise of the seed `i`."""
    return generate_in_batches(pipeline, "image", pixels, guidance_scale, steps, batch_size)


def generate_in_batches(
    pipeline: ReconstructionPipeline,
    argument: Literal["image", "caption_embeds"],
    inputs: torch.Tensor,
    guidance_scale: float,
    steps: int,
    batch_size: int,
    **settings: Any,
) -> torch.Tensor:
    """Images `(N, 3, 64, 64)` uint8 from `inputs`, which the pipeline takes as `argument`.

    Image `i` has noise of the seed `i`, whatever the size of the batches. `settings` are further arguments of the
    pipeline's call.
    """
    settings |= {"guidance_scale": guidance_scale, "num_inference_steps": steps}
    batches = []
    pipeline.keep_prompt()
    try:
        for start in range(0, len(inputs), batch_size):
            batch: dict[str, Any] = {argument: inputs[start : start + batch_size]}
            seeds = range(start, min(start + batch_size, len(inputs)))
            batches.append(generate_images(pipeline, **batch, seeds=seeds, **settings))
    finally:
        pipeline.keep_prompt(False)
    return to_uint8(torch.cat(batches))


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images in 0..1 as uint8."""
    return (images * 255).round().to(torch.uint8)


def caption_images(
    model: VLVForConditionalGeneration, processor: VLVProcessor, pixels: torch.Tensor, batch_size: int = 64
) -> list[str]:
    """Greedy captions of images `(N, 3, 64, 64)` uint8."""
    embeds = encode_images(model, processor, pixels, batch_size)
    return caption_embeddings(model, processor, embeds, batch_size=batch_size)


@torch.no_grad()
def encode_images(
    model: VLVForConditionalGeneration, processor: VLVProcessor, pixels: torch.Tensor, batch_size: int = 64
) -> torch.Tensor:
    """Caption embeddings `(N, Q, d_text)` of images `(N, 3, 64, 64)` uint8."""
    chunks = [processor(images=chunk).pixel_values for chunk in pixels.split(batch_size)]
    return torch.cat([model.model.get_caption_embeds(chunk) for chunk in chunks])


def caption_embeddings(
    model: VLVForConditionalGeneration,
    processor: VLVProcessor,
    embeds: torch.Tensor,
    instruction: str | None = None,
    batch_size: int = 64,
) -> list[str]:
    """Greedy captions of caption embeddings `(N, Q, d_text)`, as an instruction asks for them."""
    captions: list[str] = []
    for chunk in embeds.split(batch_size):
        settings: dict[str, Any] = {"text": instruction, "max_new_tokens": MAX_NEW_TOKENS}
        captions += generate_captions(model, processor, caption_embeds=chunk, **settings)
    return captions
