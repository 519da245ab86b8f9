"""What caption embeddings encode: objects, positions, the order of the embeddings, and their likeness to tokens.

VLV paper, tables 4 (left), 5 (left) and 6, and figure 6, on scenes that are known exactly.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from vlv import VLVForConditionalGeneration, VLVModel, VLVProcessor
from vlv.evaluation.composition import count_shared_labels
from vlv.evaluation.detections import Detection, match_detections
from vlv.evaluation.detections import deviations as box_deviations
from vlv.pipelines import VLVReconstructionPipeline, generate_captions

from ..data import evaluation_items
from ..encoder import build_image_processor
from ..evaluation import generate_in_batches, to_uint8
from ..grammar import parse_caption, write_caption
from ..render import IMAGE_SIZE
from ..scene_classifier import SceneClassifier
from ..scene_detector import detect_objects
from ..scoring import score_scenes
from ..teacher import build_scheduler
from ..world import Scene
from .data_efficiency import MAX_TOKENS, to_pixel_values

STEPS = 25
GUIDANCE = 2.0
BATCH_SIZE = 50
SAME_IMAGE, ANOTHER_IMAGE = "same image", "another image"  # whose truth `measure_nearest_tokens` compares with


@lru_cache(maxsize=1)
def load_teacher(teacher_dir: Path) -> StableDiffusionPipeline:
    """The teacher, without a progress bar."""
    teacher = StableDiffusionPipeline.from_pretrained(teacher_dir, safety_checker=None)
    teacher.set_progress_bar_config(disable=True)
    return teacher


def build_pipeline(encoder: VLVModel, teacher_dir: str | Path) -> VLVReconstructionPipeline:
    """Reconstruction by an encoder and the teacher that it was trained with."""
    teacher = load_teacher(Path(teacher_dir))
    pipeline = VLVReconstructionPipeline(
        encoder=encoder,
        image_processor=build_image_processor(),
        vae=teacher.vae,
        unet=teacher.unet,
        scheduler=build_scheduler(),
        tokenizer=teacher.tokenizer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def encode_images(encoder: VLVModel, images: torch.Tensor) -> torch.Tensor:
    """Caption embeddings `(N, Q, d_text)` of images `(N, 3, 64, 64)` uint8."""
    return torch.cat([encoder(pixel_values=to_pixel_values(chunk)).caption_embeds for chunk in images.split(128)])


def generate_from_embeds(pipeline: VLVReconstructionPipeline, embeds: torch.Tensor) -> torch.Tensor:
    """Images `(N, 3, 64, 64)` uint8 from caption embeddings `(N, Q, d_text)`; image `i` has seed `i`."""
    return generate_in_batches(pipeline, "caption_embeds", embeds, GUIDANCE, STEPS, BATCH_SIZE)


def generate_from_captions(teacher: StableDiffusionPipeline, captions: Sequence[str]) -> torch.Tensor:
    """The teacher's images `(N, 3, 64, 64)` uint8 of captions, from the noise that `generate_from_embeds` uses."""
    batches = [
        teacher(
            list(captions[start : start + BATCH_SIZE]),
            guidance_scale=GUIDANCE,
            num_inference_steps=STEPS,
            generator=[
                torch.Generator().manual_seed(seed) for seed in range(start, min(start + BATCH_SIZE, len(captions)))
            ],
            output_type="pt",
            height=IMAGE_SIZE,
            width=IMAGE_SIZE,
        ).images
        for start in range(0, len(captions), BATCH_SIZE)
    ]
    return to_uint8(torch.cat(batches))


def deviations(
    originals: torch.Tensor, generated: torch.Tensor, truth: Sequence[Scene], found: Sequence[Scene]
) -> dict[str, float]:
    """Mean distance of centres, and mean difference of sizes, of the objects that both images show at the same place.

    Args:
        originals: `(N, 3, 64, 64)` uint8.
        generated: The same, one for each original.
        truth: Scenes of the originals.
        found: Scenes that the scene classifier reads from the generated images.

    Returns:
        `centre` and `scale` as shares of the image's width; `matched`, the share of true objects that were compared.
    """
    each, total = [], 0
    for original, image, true_scene, found_scene in zip(originals, generated, truth, found, strict=True):
        total += len(true_scene.objects)
        pairs = match_detections(_at_places(original, true_scene), _at_places(image, found_scene))
        each += [box_deviations(*pair) for pair in pairs]
    count = max(len(each), 1)
    return {
        "centre": round(sum(own["distance"] for own in each) / count, 4),
        "scale": round(sum(own["scale"] for own in each) / count, 4),
        "matched": round(len(each) / max(total, 1), 3),
    }


def _at_places(image: torch.Tensor, scene: Scene) -> list[Detection]:
    """The objects of a scene, labelled with their places, so that those at the same place are matched."""
    return [
        replace(own, label=f"{own.label}, {o.place}")
        for o in scene.objects
        for own in detect_objects(image, Scene(None, (o,)))
    ]


def measure_reconstructions(
    encoder: VLVModel, teacher_dir: str | Path, scene_classifier: SceneClassifier, n: int = 200, split: str = "combo"
) -> dict[str, float]:
    """Scores of reconstructions, and how far their objects are from the originals'."""
    images, truth = evaluation_items(split, n)
    generated = generate_from_embeds(build_pipeline(encoder, teacher_dir), encode_images(encoder, images))
    found = scene_classifier.predict_scenes(generated)
    return score_scenes(found, truth) | deviations(images, generated, truth, found)


def measure_true_captions(
    teacher_dir: str | Path, scene_classifier: SceneClassifier, n: int = 200, split: str = "combo"
) -> dict[str, float]:
    """The measures of `measure_reconstructions` for images that the teacher generates from the true captions."""
    images, truth = evaluation_items(split, n)
    generated = generate_from_captions(load_teacher(Path(teacher_dir)), [write_caption(scene) for scene in truth])
    found = scene_classifier.predict_scenes(generated)
    return score_scenes(found, truth) | deviations(images, generated, truth, found)


def measure_truncation(
    encoder: VLVModel, teacher_dir: str | Path, scene_classifier: SceneClassifier, kept: Sequence[int], n: int = 100
) -> dict[str, dict[str, float]]:
    """Scores of reconstructions from the first caption embeddings alone, by the number of embeddings in `kept`."""
    images, truth = evaluation_items("test", n)
    embeds, pipeline = encode_images(encoder, images), build_pipeline(encoder, teacher_dir)
    return {
        str(count): score_scenes(
            scene_classifier.predict_scenes(generate_from_embeds(pipeline, embeds[:, :count])), truth
        )
        for count in kept
    }


def measure_composition(
    encoder: VLVModel,
    teacher_dir: str | Path,
    scene_classifier: SceneClassifier,
    counts: Sequence[tuple[int, int]],
    n: int = 100,
    single: bool = False,
) -> dict[str, dict[str, float]]:
    """What an image shows that is generated from the first embeddings of one image and the first of another.

    Args:
        counts: How many embeddings are taken of the first and of the second image.
        n: Pairs of images, before those that do not fit are left out. The two backgrounds of a pair differ.
        single: Pairs of images with one object each, at different places, so that both fit into one image.

    Returns:
        For each `"a+b"` of `counts`: the shares of the first's and of the second's objects that are found in the
        generated image (by name, at any place), and the shares of images with the first's and the second's background.
    """
    images, truth = evaluation_items("test", 8 * n if single else 2 * n)
    if single:
        alone = [i for i, scene in enumerate(truth) if len(scene.objects) == 1][: 2 * n]
        images, truth = images[alone], [truth[i] for i in alone]
    half = len(truth) // 2
    pairs = [(i, half + i) for i in range(half) if _fit_together(truth[i], truth[half + i], single)]
    first_truth, second_truth = [truth[a] for a, _ in pairs], [truth[b] for _, b in pairs]
    embeds, pipeline = encode_images(encoder, images), build_pipeline(encoder, teacher_dir)
    results = {}
    for first, second in counts:
        mixed = torch.stack([torch.cat([embeds[a][:first], embeds[b][:second]]) for a, b in pairs])
        found = scene_classifier.predict_scenes(generate_from_embeds(pipeline, mixed))
        results[f"{first}+{second}"] = {
            "objects of the first": _object_recall(found, first_truth),
            "objects of the second": _object_recall(found, second_truth),
            "background of the first": _background_accuracy(found, first_truth),
            "background of the second": _background_accuracy(found, second_truth),
        }
    return results


def _fit_together(first: Scene, second: Scene, single: bool) -> bool:
    places = {o.place for o in first.objects} & {o.place for o in second.objects}
    return first.background != second.background and not (single and places)


def _object_recall(found: Sequence[Scene], truth: Sequence[Scene]) -> float:
    names = [[Counter(o.name for o in scene.objects) for scene in scenes] for scenes in (found, truth)]
    shared, total = count_shared_labels(*names)
    return round((shared.sum() / total.sum()).item(), 3)


def _background_accuracy(found: Sequence[Scene], truth: Sequence[Scene]) -> float:
    return round(sum(f.background == t.background for f, t in zip(found, truth, strict=True)) / len(truth), 3)


def measure_token_embeddings(
    captioner: VLVForConditionalGeneration,
    processor: VLVProcessor,
    teacher_dir: str | Path,
    n: int = 300,
    split: str = "combo",
) -> dict[str, dict[str, float]]:
    """Scores of captions from caption embeddings, and from token embeddings of the true caption.

    The captioner was trained on caption embeddings only. Token embeddings are given padded to the length of the text
    encoder, and unpadded.
    """
    images, truth = evaluation_items(split, n)
    tokenizer, encoder = load_teacher(Path(teacher_dir)).tokenizer, captioner.model
    token_embeddings = encoder.get_input_embeddings()
    texts = [write_caption(scene) for scene in truth]
    padded_ids = tokenizer(
        texts, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        batches_of = {
            "caption embeddings": [encode_images(encoder, chunk) for chunk in images.split(BATCH_SIZE)],
            "token embeddings, padded": [token_embeddings(chunk) for chunk in padded_ids.split(BATCH_SIZE)],
            "token embeddings, unpadded": [
                token_embeddings(tokenizer(text, return_tensors="pt").input_ids) for text in texts
            ],
        }
    results = {}
    for name, batches in batches_of.items():
        captions: list[str] = []
        for embeds in batches:
            captions += generate_captions(captioner, processor, caption_embeds=embeds, max_new_tokens=MAX_TOKENS)
        results[name] = score_scenes([parse_caption(caption) for caption in captions], truth)
    return results


def measure_nearest_tokens(
    encoder: VLVModel, teacher_dir: str | Path, n: int = 300, split: str = "combo"
) -> dict[str, dict[str, float]]:
    """How often the tokens nearest to caption embeddings, by cosine, name what the image shows.

    Returns:
        The shares of true object names, of the words of true places, and of the words of true background colours, that
        are the token nearest to one of the image's embeddings. `ANOTHER_IMAGE` compares the same tokens with the truth
        of another image, which gives the level of chance.
    """
    images, truth = evaluation_items(split, n)
    tokenizer = load_teacher(Path(teacher_dir)).tokenizer
    table = encoder.text_encoder.get_input_embeddings().weight.detach()
    table = torch.nn.functional.normalize(table, dim=-1)  # (V, d)
    embeds = torch.nn.functional.normalize(encode_images(encoder, images), dim=-1)  # (N, Q, d)
    nearest = [set(tokenizer.convert_ids_to_tokens(row)) for row in (embeds @ table.T).argmax(-1).tolist()]
    shifted = truth[1:] + truth[:1]
    return {SAME_IMAGE: _named(nearest, truth), ANOTHER_IMAGE: _named(nearest, shifted)}


def _named(nearest: Sequence[set[str]], truth: Sequence[Scene]) -> dict[str, float]:
    """Shares of true words that are among the nearest tokens."""
    true_words = {
        "objects": [{o.name for o in scene.objects} for scene in truth],
        "places": [{word for o in scene.objects for word in o.place.split()} for scene in truth],
        "colours": [set((scene.background or "").split()) for scene in truth],
    }
    return {
        name: round(sum(len(w & n) for w, n in zip(sets, nearest, strict=True)) / sum(map(len, sets)), 3)
        for name, sets in true_words.items()
    }
