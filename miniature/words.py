"""Words beside an image: how much of either appears when an image is generated from both.

`python -m vlv.miniature.words MODEL` prints the table of docs/image_prompts.md. Each scene has two objects; the words
ask for a third one, at a place that is empty.
"""

import argparse
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from vlv.evaluation import markdown_table
from vlv.pipelines import ReconstructionPipeline, load_reconstruction

from .evaluation import SCENE_CLASSIFIER_FILE, generate_in_batches
from .grammar import write_caption
from .render import render
from .scene_classifier import SceneClassifier
from .scoring import ASPECTS, score_scenes
from .world import CORNERS, OBJECTS, SIZES, Scene, SceneObject, sample_scenes

HEADER = ("embeddings kept", "image's objects shown", "words' object shown", "F1, image", "F1, words", "background")
SEED = 23


def scenes_with_words(count: int, split: str = "test") -> Iterator[tuple[torch.Tensor, Scene, Scene]]:
    """Images `(3, 64, 64)` uint8 of two objects, their scenes, and the scenes of the words: one object elsewhere."""
    rng = random.Random(f"words/{SEED}")
    scenes = sample_scenes(rng, split, n_objects=2)
    for _ in range(count):
        scene = next(scenes)
        empty = [place for place in CORNERS if place not in {item.place for item in scene.objects}]
        words = Scene(None, (SceneObject(rng.choice(OBJECTS), rng.choice(SIZES), rng.choice(empty)),))
        yield torch.from_numpy(render(scene, rng)).permute(2, 0, 1), scene, words


def share_shown(predicted: Sequence[Scene], true: Sequence[Scene]) -> float:
    """The share of the objects of `true` that the predicted scenes have at the same place."""
    aspect = ASPECTS["object_place_f1"]
    found = asked = 0
    for p, t in zip(predicted, true, strict=True):
        wanted = Counter(map(aspect, t.objects))
        found += (wanted & Counter(map(aspect, p.objects))).total()
        asked += wanted.total()
    return found / asked


def measure(
    pipeline: ReconstructionPipeline,
    scene_classifier: SceneClassifier,
    image_tokens: Sequence[int],
    count: int,
    steps: int,
    prompt_first: bool = False,
    guidance_scale: float = 2.0,
) -> Iterator[tuple[int, float, float, float, float, float]]:
    """Scores for each number of embeddings that are kept, as in `HEADER`.

    The scene classifier's scenes of the generated images are compared with the image's and the words'. F1 is that of
    objects with their place; the background is the share of images with the background of the image.
    """
    pixels, scenes, words = zip(*scenes_with_words(count), strict=True)
    caption_embeds = pipeline.get_caption_embeds(torch.stack(pixels))
    prompts = [write_caption(scene) for scene in words]
    for kept in image_tokens:
        rows = pipeline.add_prompt(caption_embeds, prompts, kept, prompt_first)
        images = generate_in_batches(pipeline, "caption_embeds", rows, guidance_scale, steps, batch_size=24)
        predicted = scene_classifier.predict_scenes(images)
        of_image, of_words = score_scenes(predicted, scenes), score_scenes(predicted, words)
        shown = share_shown(predicted, scenes), share_shown(predicted, words)
        yield kept, *shown, of_image["object_place_f1"], of_words["object_place_f1"], of_image["background"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vlv.miniature.words", description=__doc__)
    parser.add_argument("model", help="folder of a miniature")
    parser.add_argument("--scene-classifier", metavar="DIR", help="folder with the scene classifier (default: MODEL)")
    parser.add_argument("--count", type=int, default=48, help="scenes (default: 48)")
    parser.add_argument("--steps", type=int, default=15, help="denoising steps (default: 15)")
    parser.add_argument(
        "--image-tokens", type=int, nargs="+", metavar="N", help="embeddings that are kept (default: 0, 4, 8, ... all)"
    )
    parser.add_argument("--prompt-first", action="store_true", help="place the words before the embeddings")
    arguments = parser.parse_args()
    folder = Path(arguments.scene_classifier or arguments.model)
    scene_classifier = SceneClassifier.load(folder / SCENE_CLASSIFIER_FILE)
    pipeline = load_reconstruction(arguments.model)
    pipeline.set_progress_bar_config(disable=True)
    everything = pipeline.encoder.config.num_query_tokens
    kept = arguments.image_tokens or [*range(0, everything, 4), everything]
    rows = measure(pipeline, scene_classifier, kept, arguments.count, arguments.steps, arguments.prompt_first)
    cells = [(str(row[0]), *(f"{value:.3f}" for value in row[1:])) for row in rows]
    print(markdown_table(HEADER, cells))


if __name__ == "__main__":
    main()
