"""What caption embeddings hold: how much of a picture, how exactly, in which order, and how like words they are.

VLV paper, tables 4 (left), 5 (left) and 6, and figure 6, where truth is known.
"""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from vlv import VLVForConditionalGeneration, VLVModel, VLVProcessor
from vlv.pipelines import VLVReconstructionPipeline

from ..encoder import build_image_processor
from ..data import evaluation_items
from ..grammar import parse_caption, write_caption
from ..render import IMAGE_SIZE
from ..scene_classifier import SceneClassifier
from ..scoring import score_scenes
from ..teacher import build_scheduler
from ..world import Scene
from .data_efficiency import to_pixel_values

STEPS = 25
GUIDANCE = 2.0
DIFFERENCE = 60  # of 765: how far a pixel's colour is from the background's before it belongs to an object
WINDOWS = {  # rows and columns in which an object of this place is looked for
    "top left": (slice(0, 32), slice(0, 32)),
    "top right": (slice(0, 32), slice(32, 64)),
    "bottom left": (slice(32, 64), slice(0, 32)),
    "bottom right": (slice(32, 64), slice(32, 64)),
    "centre": (slice(0, 64), slice(0, 64)),
}


@lru_cache(maxsize=1)
def _teacher(teacher_dir: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(teacher_dir, safety_checker=None)


def pipeline_of(encoder: VLVModel, teacher_dir: str | Path) -> VLVReconstructionPipeline:
    """Reconstruction from an encoder, by the teacher that it learnt from."""
    teacher = _teacher(Path(teacher_dir))
    pipeline = VLVReconstructionPipeline(
        encoder, teacher.vae, teacher.unet, build_scheduler(), build_image_processor(), teacher.tokenizer
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def embed(encoder: VLVModel, pictures: torch.Tensor) -> torch.Tensor:
    """`z` of pictures `(N, 3, 64, 64)` uint8."""
    return torch.cat([encoder(pixel_values=to_pixel_values(chunk)).caption_embeds for chunk in pictures.split(128)])


def draw(pipeline: VLVReconstructionPipeline, embeds: torch.Tensor, batch_size: int = 50) -> torch.Tensor:
    """Pictures `(N, 3, 64, 64)` uint8 from caption embeddings, each from its own noise."""
    drawn = []
    for start in range(0, len(embeds), batch_size):
        chunk = embeds[start : start + batch_size]
        pictures = pipeline(
            caption_embeds=chunk,
            guidance_scale=GUIDANCE,
            num_inference_steps=STEPS,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(chunk))],
            output_type="pt",
        ).images
        drawn.append((pictures * 255).round().to(torch.uint8))
    return torch.cat(drawn)


def locate(picture: torch.Tensor, place: str) -> tuple[float, float, float] | None:
    """Centre (x, y) and size of what stands at a place, in widths of the picture; None if nothing does.

    Args:
        picture: `(3, 64, 64)` uint8. Its median colour is taken for the background.

    Returns:
        The centroid of the pixels that differ from the background, and the square root of their area.
    """
    colours = picture.float()
    background = colours.flatten(1).median(dim=1).values  # (3,)
    mask = (colours - background[:, None, None]).abs().sum(0) > DIFFERENCE
    rows, columns = WINDOWS[place]
    inside = torch.zeros_like(mask)
    inside[rows, columns] = mask[rows, columns]
    if not inside.any():
        return None
    y, x = inside.nonzero().float().mean(0).tolist()
    return x / IMAGE_SIZE, y / IMAGE_SIZE, inside.sum().sqrt().item() / IMAGE_SIZE


def deviations(
    originals: torch.Tensor, drawn: torch.Tensor, truth: Sequence[Scene], found: Sequence[Scene]
) -> dict[str, float]:
    """Mean distance of centres and mean difference of sizes of the objects that both pictures show at the same place.

    Both in widths of the picture; `matched` is the share of the true objects that were compared.
    """
    centres, sizes, total = [], [], 0
    for original, picture, scene, read in zip(originals, drawn, truth, found, strict=True):
        total += len(scene.objects)
        there = {(o.name, o.place) for o in read.objects}
        for o in scene.objects:
            if (o.name, o.place) not in there:
                continue
            one, other = locate(original, o.place), locate(picture, o.place)
            if one is not None and other is not None:
                centres.append(((one[0] - other[0]) ** 2 + (one[1] - other[1]) ** 2) ** 0.5)
                sizes.append(abs(one[2] - other[2]))
    count = max(len(centres), 1)
    return {
        "centre": round(sum(centres) / count, 4),
        "scale": round(sum(sizes) / count, 4),
        "matched": round(len(centres) / max(total, 1), 3),
    }


def measure_reconstructions(
    encoder: VLVModel, teacher_dir: str | Path, scene_classifier: SceneClassifier, n: int = 200, split: str = "combo"
) -> dict[str, Any]:
    """Scores of reconstructions, and how far objects moved in them."""
    pictures, truth = evaluation_items(split, n)
    drawn = draw(pipeline_of(encoder, teacher_dir), embed(encoder, pictures))
    found = scene_classifier.predict_scenes(drawn)
    return score_scenes(found, truth) | deviations(pictures, drawn, truth, found)


def measure_words(
    teacher_dir: str | Path, scene_classifier: SceneClassifier, n: int = 200, split: str = "combo"
) -> dict[str, Any]:
    """The same of the teacher's pictures of the true captions: what words alone can tell."""
    pictures, truth = evaluation_items(split, n)
    teacher = _teacher(Path(teacher_dir))
    teacher.set_progress_bar_config(disable=True)
    drawn = []
    for start in range(0, n, 50):
        chunk = truth[start : start + 50]
        images = teacher(
            [write_caption(scene) for scene in chunk],
            guidance_scale=GUIDANCE,
            num_inference_steps=STEPS,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(chunk))],
            output_type="pt",
            height=IMAGE_SIZE,
            width=IMAGE_SIZE,
        ).images
        drawn.append((images * 255).round().to(torch.uint8))
    found = scene_classifier.predict_scenes(torch.cat(drawn))
    return score_scenes(found, truth) | deviations(pictures, torch.cat(drawn), truth, found)


def measure_truncation(
    encoder: VLVModel, teacher_dir: str | Path, scene_classifier: SceneClassifier, kept: Sequence[int], n: int = 100
) -> dict[str, Any]:
    """Scores of reconstructions from the first so many caption embeddings alone."""
    pictures, truth = evaluation_items("test", n)
    embeds, pipeline = embed(encoder, pictures), pipeline_of(encoder, teacher_dir)
    return {
        str(count): score_scenes(scene_classifier.predict_scenes(draw(pipeline, embeds[:, :count])), truth) for count in kept
    }


def measure_composition(
    encoder: VLVModel,
    teacher_dir: str | Path,
    scene_classifier: SceneClassifier,
    counts: Sequence[tuple[int, int]],
    n: int = 100,
    single: bool = False,
) -> dict[str, Any]:
    """What of two pictures survives when the first embeddings of one are followed by the first of the other.

    Args:
        n: Pairs, less those that do not fit.
        single: Pairs of pictures with one object each, at different places, so that there is room for both.

    Returns:
        For each `"a+b"`: shares of both pictures' objects that are found in the drawn one (names, wherever they
        stand), and how often its background is the first's and the second's. Pairs have different backgrounds.
    """
    pictures, truth = evaluation_items("test", 8 * n if single else 2 * n)
    if single:
        alone = [i for i, scene in enumerate(truth) if len(scene.objects) == 1][: 2 * n]
        pictures, truth = pictures[alone], [truth[i] for i in alone]
    half = len(truth) // 2
    pairs = [(i, half + i) for i in range(half) if _may_be_mixed(truth[i], truth[half + i], single)]
    embeds, pipeline = embed(encoder, pictures), pipeline_of(encoder, teacher_dir)
    figures = {}
    for first, second in counts:
        mixed = torch.stack([torch.cat([embeds[a][:first], embeds[b][:second]]) for a, b in pairs])
        found = scene_classifier.predict_scenes(draw(pipeline, mixed))
        figures[f"{first}+{second}"] = {
            "objects of the first": _share(found, [truth[a] for a, _ in pairs]),
            "objects of the second": _share(found, [truth[b] for _, b in pairs]),
            "background of the first": _agree(found, [truth[a] for a, _ in pairs]),
            "background of the second": _agree(found, [truth[b] for _, b in pairs]),
        }
    return figures


def _may_be_mixed(first: Scene, second: Scene, single: bool) -> bool:
    places = {o.place for o in first.objects} & {o.place for o in second.objects}
    return first.background != second.background and not (single and places)


def _share(found: Sequence[Scene], truth: Sequence[Scene]) -> float:
    names = [
        (Counter(o.name for o in f.objects), Counter(o.name for o in t.objects))
        for f, t in zip(found, truth, strict=True)
    ]
    return round(sum((f & t).total() for f, t in names) / sum(t.total() for _, t in names), 3)


def _agree(found: Sequence[Scene], truth: Sequence[Scene]) -> float:
    return round(sum(f.background == t.background for f, t in zip(found, truth, strict=True)) / len(truth), 3)


@torch.no_grad()
def measure_likeness_to_words(
    captioner: VLVForConditionalGeneration,
    processor: VLVProcessor,
    teacher_dir: str | Path,
    n: int = 300,
    split: str = "combo",
) -> dict[str, Any]:
    """Captions from `z`, and from the embeddings of the true caption's words, which the captioner never saw."""
    pictures, truth = evaluation_items(split, n)
    tokenizer, encoder = _teacher(Path(teacher_dir)).tokenizer, captioner.model
    table = encoder.get_input_embeddings()
    figures = {}
    for name in ("caption embeddings", "words, padded", "words, as many as there are"):
        captions = []
        for start in range(0, n, 50):
            if name == "caption embeddings":
                batches = [embed(encoder, pictures[start : start + 50])]
            else:
                texts = [write_caption(scene) for scene in truth[start : start + 50]]
                if name == "words, padded":
                    length = tokenizer.model_max_length
                    ids = tokenizer(texts, padding="max_length", max_length=length, return_tensors="pt").input_ids
                    batches = [table(ids)]
                else:
                    batches = [table(tokenizer(text, return_tensors="pt").input_ids) for text in texts]
            for embeds in batches:
                ids = captioner.generate(caption_embeds=embeds, max_new_tokens=64, do_sample=False)
                captions += processor.batch_decode(ids, skip_special_tokens=True)
        figures[name] = score_scenes([parse_caption(caption) for caption in captions], truth)
    return figures


def measure_nearest_words(
    encoder: VLVModel, teacher_dir: str | Path, n: int = 300, split: str = "combo"
) -> dict[str, Any]:
    """How often the nearest words of `z`'s vectors name what the picture shows, and what another picture shows.

    Returns:
        Shares of true object names, of the words of true places, and of the words of true colours that are the nearest
        word of one of the picture's vectors; `by chance` is the same against another picture's truth.
    """
    pictures, truth = evaluation_items(split, n)
    tokenizer = _teacher(Path(teacher_dir)).tokenizer
    words = torch.nn.functional.normalize(
        encoder.text_encoder.get_input_embeddings().weight.detach(), dim=-1
    )  # (V, d)
    embeds = torch.nn.functional.normalize(embed(encoder, pictures), dim=-1)  # (N, Q, d)
    nearest = [set(tokenizer.convert_ids_to_tokens(row)) for row in (embeds @ words.T).argmax(-1).tolist()]
    shifted = truth[1:] + truth[:1]
    return {"of the picture": _named(nearest, truth), "by chance": _named(nearest, shifted)}


def _named(nearest: Sequence[set[str]], truth: Sequence[Scene]) -> dict[str, float]:
    wanted = {
        "objects": [{o.name for o in scene.objects} for scene in truth],
        "places": [{word for o in scene.objects for word in o.place.split()} for scene in truth],
        "colours": [set((scene.background or "").split()) for scene in truth],
    }
    return {
        name: round(sum(len(w & n) for w, n in zip(sets, nearest, strict=True)) / sum(map(len, sets)), 3)
        for name, sets in wanted.items()
    }


__all__ = [
    "deviations",
    "locate",
    "measure_composition",
    "measure_likeness_to_words",
    "measure_nearest_words",
    "measure_reconstructions",
    "measure_truncation",
    "measure_words",
    "pipeline_of",
]
