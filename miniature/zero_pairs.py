"""Captions from no image-caption pairs: proposals for stage 3 of the miniature that know text and images, apart.

`python -m vlv.miniature.zero_pairs ROOT` proposes captions of images in three ways and prints how true they are:

- `search`: the slots of the grammar are filled one after the other, each with what the frozen text-to-image model
  gives the highest score. Backgrounds come first, then one object after the other, until none raises the score, and
  at last backgrounds again;
- `nearest`: the words whose token embeddings are nearest to the caption embeddings of the image, in their order;
- `repeat`: the greedy captions of a captioner whose language model has learnt to repeat texts from their
  conditioning, by the frozen text encoder, and has read no image.

It writes a captioner for each of `search` and `repeat`, which `python -m vlv.miniature.stage3 ROOT --start ...`
starts from. That of `search` is trained on the captions that it found, as stage 2 is on pairs.
"""

import argparse
import itertools
import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch.nn import functional as F

from vlv import VLVModel, hub
from vlv.evaluation import markdown_table
from vlv.files import write_atomically, write_json
from vlv.pipelines import DiffusionScorer
from vlv.pipelines.diffusion_score import seed_of_pixels

from .data import SceneDataset, evaluation_items
from .evaluation import caption_images
from .grammar import write_caption
from .paper.data_efficiency import UPDATES, compute_conditioning, to_pixel_values
from .scene_changes import in_order
from .score_ranking import load_scorer
from .stage3 import COLUMNS, IMAGE_SEED, find_language_model, measure, new_scenes, render_scene, train_captioner
from .world import COLOURS, CORNERS, MAX_OBJECTS, OBJECTS, PLACES, SIZES, SPLITS, Scene, SceneObject

TEXT_SEED = 53  # of the texts that are repeated
WAYS = ("search", "nearest", "repeat")


def search_scene(score: Callable[[Sequence[Scene]], Sequence[float]]) -> Scene:
    """The scene whose slots are filled greedily: a background, then objects, as long as one raises the score.

    Large objects are tried first, and small ones where none of these raises it. The last step is the background again.

    Args:
        score: Scores of scenes; the higher, the better.
    """
    best, value = _best([Scene(colour, ()) for colour in COLOURS], score)
    while free_places(best):
        for size in SIZES[::-1]:
            found, raised = _best(additions(best, size), score)
            if raised > value:
                break
        else:
            break
        best, value = max((found, raised), _best([with_other_size(found)], score), key=lambda pair: pair[1])
    return _best([Scene(colour, best.objects) for colour in COLOURS], score)[0]


def free_places(scene: Scene) -> list[str]:
    """Where a scene can have one more object. A single object alone can be at the centre."""
    taken = {own.place for own in scene.objects}
    if "centre" in taken or len(taken) == MAX_OBJECTS:
        return []
    return [place for place in (CORNERS if taken else PLACES) if place not in taken]


def additions(scene: Scene, size: str) -> list[Scene]:
    """The scenes with one more object of a size, which is the last, whatever its place."""
    return [
        Scene(scene.background, (*scene.objects, SceneObject(name, size, place)))
        for place in free_places(scene)
        for name in OBJECTS
    ]


def with_other_size(scene: Scene) -> Scene:
    """The scene whose last object has the other size."""
    *others, last = scene.objects
    (size,) = set(SIZES) - {last.size}
    return Scene(scene.background, (*others, SceneObject(last.name, size, last.place)))


def _best(scenes: Sequence[Scene], score: Callable[[Sequence[Scene]], Sequence[float]]) -> tuple[Scene, float]:
    values = score(scenes)
    place = max(range(len(scenes)), key=values.__getitem__)
    return scenes[place], values[place]


def describe(scene: Scene, rng: random.Random | None = None) -> str:
    """The caption of a scene, whose objects may be in any order."""
    return write_caption(in_order(scene.background, scene.objects), rng)


@torch.no_grad()
def search_caption(scorer: DiffusionScorer, image: torch.Tensor, rng: random.Random) -> str:
    """The caption of an image `(3, 64, 64)` uint8 by `search_scene`; `rng` chooses its phrasing."""
    seed = seed_of_pixels(image)
    latents = scorer.encode_images(image[None], [seed])
    known: list[dict[str | None, float]] = [{}]

    def score(scenes: Sequence[Scene]) -> list[float]:
        return scorer.score_latents(latents, [list(map(describe, scenes))], [seed], known=known).scores[0].tolist()

    return describe(search_scene(score), rng)


def search_captions(
    scorer: DiffusionScorer, images: Iterable[torch.Tensor], count: int, file: Path, seed: int = 0
) -> list[str]:
    """Captions of `count` images. A file has a line of JSON for each, and those that are there are not searched again.

    Args:
        seed: Of the phrasing.
    """
    complete = file.read_text().split("\n")[:-1] if file.exists() else []  # without a line that a kill has cut off
    found = [json.loads(line) for line in complete]
    write_atomically(file, lambda path: path.write_text("".join(f"{line}\n" for line in complete)))
    with open(file, "a", encoding="utf-8") as lines:
        for number, image in enumerate(itertools.islice(images, len(found), count), start=len(found)):
            found.append(search_caption(scorer, image, random.Random(f"{seed}/search/{number}")))
            print(json.dumps(found[-1]), file=lines, flush=True)
    return found[:count]


@torch.no_grad()
def nearest_words(encoder: VLVModel, tokenizer, images: torch.Tensor) -> list[str]:
    """The words nearest by cosine to each caption embedding of images `(N, 3, 64, 64)` uint8."""
    table = F.normalize(encoder.text_encoder.get_input_embeddings().weight, dim=-1)  # (V, d)
    embeds = torch.cat([encoder(pixel_values=to_pixel_values(part)).caption_embeds for part in images.split(128)])
    ids = (F.normalize(embeds, dim=-1) @ table.T).argmax(-1)  # (N, Q)
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


@torch.no_grad()
def text_conditioning(encoder: VLVModel, tokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Conditioning `(N, Q, d_text)` of texts, at as many positions as there are caption embeddings."""
    count, parts = encoder.config.num_query_tokens, []
    for start in range(0, len(texts), 256):
        own = list(texts[start : start + 256])
        settings = {"padding": "max_length", "truncation": True, "max_length": encoder.config.num_text_positions}
        ids = tokenizer(own, return_tensors="pt", **settings).input_ids
        parts.append(encoder(input_ids=ids).conditioning[:, :count])
    return torch.cat(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vlv.miniature.zero_pairs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("root", type=Path, help="folder of everything that is trained, as of vlv.miniature.stage3")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default: all")
    parser.add_argument(
        "--encoder", default="checkpoints/vlv-miniature", help="folder of a miniature (default: %(default)s)"
    )
    parser.add_argument("--images", type=int, default=1000, help="that are searched (default: %(default)s)")
    parser.add_argument("--split", choices=SPLITS, default="combo", help="of the images (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=20_000, help="that are repeated (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=UPDATES, help="of a captioner (default: %(default)s)")
    parser.add_argument("--num-pairs", type=int, default=2, metavar="K", help="of a score (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="the denoiser computes in bfloat16")
    parser.add_argument("--scenes", type=int, default=300, help="captioned of each split (default: %(default)s)")
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0],
        help="each of the images or texts, and of the training; scores are means over them (default: 0)",
    )
    options = parser.parse_args(arguments)
    print(table([measure_ways(options, seed) for seed in options.seeds]))


def measure_ways(options: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """Scores of the proposals and of the captioners that learn from them; trains what is missing.

    Returns:
        A row for each, with `captions`, `images` and the scores; also as `zero-pairs-WAYS-seed-N.json` in the root.
    """
    root: Path = options.root
    name = f"{Path(options.encoder).name}-{hub.fingerprint(options.encoder)[:8]}"
    pipeline, scorer = load_scorer(options.encoder, num_pairs=options.num_pairs, batch_size=128)
    if options.bf16:
        scorer.diffusion_decoder.denoiser.to(torch.bfloat16)
    encoder, _ = hub.load_encoder(options.encoder)
    held_out = {split: evaluation_items(split, options.scenes) for split in ("combo", "test")}
    rows: list[dict[str, Any]] = []

    def add(captions: str, images: str, *measured: Any) -> None:
        rows.append({"captions": captions, "images": images, **measure(*measured)})

    for way in options.ways:
        if way == "nearest":
            for split, (images, truth) in held_out.items():
                add(way, split, nearest_words(encoder, pipeline.tokenizer, images), truth)
            continue
        if way == "search":
            excluded = [scene for _, scenes in held_out.values() for scene in scenes]
            of_images = IMAGE_SEED + seed
            places, seen = zip(*new_scenes(options.images, options.split, of_images, excluded), strict=True)
            own = [render_scene(place, options.split, of_images) for place in places]
            of_search = f"{name}-{options.split}-without-{options.scenes}-K{options.num_pairs}"
            file = root / f"search-{of_search}{'-bf16' if options.bf16 else ''}-seed-{seed}.jsonl"
            captions = search_captions(scorer, own, options.images, file, seed)
            add("search itself", "its own", captions, seen)
            conditioning = compute_conditioning(encoder, torch.stack(own))
            start = f"{file.stem}-{options.images}-images"
        else:
            texts = SceneDataset(options.texts, seed=TEXT_SEED + seed, fields=("caption",))
            captions = [texts[index]["caption"] for index in range(options.texts)]
            conditioning = text_conditioning(encoder, pipeline.tokenizer, captions)
            start = f"repeat-{name}-seed-{seed}-{options.texts}-texts"
        folder = root / f"start-{start}-{options.updates}-updates"
        if not (folder / "config.json").exists():
            arguments = options.encoder, find_language_model(root), conditioning, captions
            train_captioner(folder, *arguments, seed, options.updates)
        captioner, processor = hub.load_captioner(folder)
        for split, (images, truth) in held_out.items():
            add(f"captioner of {way}", split, caption_images(captioner, processor, images), truth)
    settings = {name: str(value) for name, value in vars(options).items() if name != "seeds"} | {"seed": str(seed)}
    file = root / f"zero-pairs-{'-'.join(options.ways)}-seed-{seed}.json"
    write_json(file, {"settings": settings, "rows": rows})
    return rows


def table(of_seeds: Sequence[list[dict[str, Any]]]) -> str:
    """The rows of `measure_ways` for each seed as Markdown: means, and the F1 of each seed."""
    cells = []
    for rows in zip(*of_seeds, strict=True):
        means = [f"{fmean(row[name] for row in rows):.3f}" for name in COLUMNS]
        of_each = ", ".join(f"{row['object_place_f1']:.3f}" for row in rows)
        cells.append([rows[0]["captions"], rows[0]["images"], *means, of_each])
    return markdown_table(("captions of", "images", *COLUMNS.values(), "F1 of each"), cells)


if __name__ == "__main__":
    main()
