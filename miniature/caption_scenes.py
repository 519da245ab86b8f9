"""Captions unseen scenes and scores them by the parser: `python -m vlv.miniature.caption_scenes MODEL`."""

import argparse
from collections.abc import Sequence
from dataclasses import replace

from vlv import hub
from vlv.evaluation import markdown_table

from .data import evaluation_items
from .evaluation import SPLITS, caption_images
from .grammar import parse_caption, write_caption
from .metrics import METRICS
from .scoring import score_scenes
from .world import OBJECTS, Scene


def without_names(scene: Scene) -> Scene:
    """The scene with the same object at each place, so that number, places and sizes alone are compared."""
    return replace(scene, objects=tuple(replace(item, name=OBJECTS[0]) for item in scene.objects))


def caption_scenes(model: str, count: int = 20, split: str = "test") -> str:
    """Two Markdown tables: the scenes with their captions, and the scores of the captions.

    Args:
        model: Folder or repo id of a captioner.
        count: The first so many scenes of the evaluation.
        split: `"test"` or `"combo"`.
    """
    pixels, scenes = evaluation_items(split, count)
    captions = caption_images(*hub.load_captioner(model), pixels, batch_size=10)
    predicted = [parse_caption(caption) for caption in captions]
    rows = [
        (str(number), write_caption(scene), " ".join(caption.split()).replace("|", "\\|"), "yes" if right else "no")
        for number, (scene, caption, right) in enumerate(
            zip(scenes, captions, [p == s for p, s in zip(predicted, scenes, strict=True)], strict=True), start=1
        )
    ]
    scores = score_scenes(predicted, scenes)
    alike = score_scenes([without_names(scene) for scene in predicted], [without_names(scene) for scene in scenes])
    return "\n\n".join(
        [
            markdown_table(("scene", "what it shows", "caption", "exact"), rows),
            markdown_table(
                (f"{count} scenes of {split}", *METRICS.values()),
                [
                    ("captions", *(f"{scores[metric]:.3f}" for metric in METRICS)),
                    ("all objects taken for one", *(f"{alike[metric]:.3f}" for metric in METRICS)),
                ],
            ),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vlv.miniature.caption_scenes", description=__doc__)
    parser.add_argument("model", help="folder or repo id of a captioner")
    parser.add_argument("--count", type=int, default=20, help="number of scenes (default: %(default)s)")
    parser.add_argument("--split", choices=SPLITS, default="test", help="their split (default: %(default)s)")
    options = parser.parse_args(arguments)
    print(caption_scenes(options.model, options.count, options.split))


if __name__ == "__main__":
    main()
