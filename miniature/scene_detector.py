"""Objects of scenes with their boxes: names and places by the scene classifier, positions by the pixels."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from vlv.evaluation.detections import BACKGROUND, Detected, Detection
from vlv.evaluation.features import load_rgb

from .render import IMAGE_SIZE
from .scene_classifier import SceneClassifier, resize_to_scene
from .world import Scene

COLOUR_DISTANCE = 60  # of 765: a pixel whose colour is farther from the background's belongs to an object
WINDOWS = {  # place -> rows and columns in which its object is searched
    "top left": (slice(0, 32), slice(0, 32)),
    "top right": (slice(0, 32), slice(32, 64)),
    "bottom left": (slice(32, 64), slice(0, 32)),
    "bottom right": (slice(32, 64), slice(32, 64)),
    "centre": (slice(0, 64), slice(0, 64)),
}


class SceneDetector:
    """Finds the objects of scenes, and their background, as a `vlv.evaluation.detections.Detector`.

    Args:
        path: The weights of the scene classifier.

    Raises:
        FileNotFoundError: If there is no such file.
    """

    name = "scene classifier"

    def __init__(self, path: str | Path):
        self.scene_classifier = SceneClassifier.load(path)

    def detect(self, paths: Sequence[Path], names: Sequence[str] | None = None) -> Iterator[Detected]:
        """What it finds in each image file, of any size. Raises `ValueError` if one cannot be read."""
        images = torch.stack([resize_to_scene(load_rgb(path)) for path in paths])
        for image, scene in zip(images, self.scene_classifier.predict_scenes(images), strict=True):
            yield Detected(detect_objects(image, scene))


def detect_objects(image: torch.Tensor, scene: Scene) -> list[Detection]:
    """The objects of a scene that can be located in its image `(3, 64, 64)` uint8, and its background.

    Centre and size are shares of the image's width; an object is as wide as it is high.
    """
    found = []
    for o in scene.objects:
        located = locate(image, o.place)
        if located is not None:
            x, y, size = located
            found.append(Detection(o.name, (x, y), (size, size)))
    if scene.background is not None:
        found.append(Detection(scene.background, kind=BACKGROUND))
    return found


def locate(image: torch.Tensor, place: str) -> tuple[float, float, float] | None:
    """Centre (x, y) and size of the object at a place, as shares of the image's width; None if there is no object.

    Args:
        image: `(3, 64, 64)` uint8. Its median colour is taken as the background.
        place: One of `WINDOWS`.

    Returns:
        The centroid of the pixels that differ from the background, and the square root of their area.
    """
    colours = image.float()
    background = colours.flatten(1).median(dim=1).values  # (3,)
    mask = (colours - background[:, None, None]).abs().sum(0) > COLOUR_DISTANCE
    rows, columns = WINDOWS[place]
    inside = torch.zeros_like(mask)
    inside[rows, columns] = mask[rows, columns]
    if not inside.any():
        return None
    y, x = inside.nonzero().float().mean(0).tolist()
    return x / IMAGE_SIZE, y / IMAGE_SIZE, inside.sum().sqrt().item() / IMAGE_SIZE
