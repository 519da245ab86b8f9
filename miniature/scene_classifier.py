"""The scene classifier: a small CNN that predicts the scene of an image, to score generated images.

It is independent of the system that it scores: it is trained on rendered scenes only. It is also the only part that is
trained on scenes of every split. Its own accuracy on `test` and `combo` is reported beside the scores.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from vlv import hub
from vlv.evaluation.caption_sets import Measured
from vlv.evaluation.features import load_rgb

from .data import SceneDataset, evaluation_items
from .scene_agreement import measure_agreement
from .scoring import score_scenes
from .training import train_module
from .world import COLOURS, OBJECTS, PLACES, SIZES, Scene, SceneObject

ABSENT = len(OBJECTS)  # the class of an empty place
BATCH_SIZE = 64  # image files that are read at once


class SceneClassifier(nn.Module):
    """Predicts an object (or none) and its size for each place, and one background colour."""

    def __init__(self, width: int = 32):
        super().__init__()

        def block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
            )

        self.features = nn.Sequential(
            block(3, width, 2),
            block(width, 2 * width, 2),
            block(2 * width, 2 * width, 1),
            block(2 * width, 4 * width, 2),
            block(4 * width, 4 * width, 1),
            block(4 * width, width, 1),
        )
        self.hidden = nn.Linear(width * 8 * 8, 256)
        self.objects = nn.Linear(256, len(PLACES) * (len(OBJECTS) + 1))
        self.sizes = nn.Linear(256, len(PLACES) * len(SIZES))
        self.background = nn.Linear(256, len(COLOURS))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`(B, 3, 64, 64)` uint8 to logits `(B, 5, 17)`, `(B, 5, 2)` and `(B, 8)`."""
        hidden = self.embed(pixels)
        objects = self.objects(hidden).unflatten(1, (len(PLACES), -1))
        sizes = self.sizes(hidden).unflatten(1, (len(PLACES), -1))
        return objects, sizes, self.background(hidden)

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features `(B, 256)` of `(B, 3, 64, 64)` uint8, which the predictions are made from."""
        features = self.features(pixels.float() / 127.5 - 1).flatten(1)  # (B, width * 64)
        return F.relu(self.hidden(features))

    @torch.no_grad()
    def predict_scenes(self, pixels: torch.Tensor) -> list[Scene]:
        """The predicted scene of each of `(B, 3, 64, 64)` uint8 images."""
        was_training, _ = self.training, self.eval()
        scenes = []
        device = next(self.parameters()).device
        for chunk in pixels.to(device).split(256):
            objects, sizes, backgrounds = (logits.argmax(-1).tolist() for logits in self(chunk))
            for names, extents, background in zip(objects, sizes, backgrounds, strict=True):
                found = [
                    SceneObject(OBJECTS[name], SIZES[size], place)
                    for name, size, place in zip(names, extents, PLACES, strict=True)
                    if name != ABSENT
                ]
                scenes.append(Scene(COLOURS[background], tuple(found)))
        self.train(was_training)
        return scenes

    def save(self, path: str | Path) -> None:
        """Saves the weights in half precision. `measure_scene_classifier` is to be run on the saved weights."""
        save_file({name: t.half() if t.is_floating_point() else t for name, t in self.state_dict().items()}, path)

    @classmethod
    def load(cls, path: str | Path) -> "SceneClassifier":
        """Loads what `save` wrote, in float32 and evaluation mode.

        Raises:
            FileNotFoundError: If there is no such file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no scene classifier at {path}; `make miniature` trains one")
        model = cls()
        model.load_state_dict({n: t.float() if t.is_floating_point() else t for n, t in load_file(path).items()})
        return model.eval()


class SceneClassifierFeatures:
    """The classifier's features of images of any size, as a `vlv.evaluation.features.FeatureExtractor`.

    Args:
        path: The weights.

    Raises:
        FileNotFoundError: If there is no such file.
    """

    name = "scene classifier, 256 features"

    def __init__(self, path: str | Path):
        self.scene_classifier = SceneClassifier.load(path)
        self.fingerprint = hub.fingerprint(path)

    @torch.no_grad()
    def __call__(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Features `(N, 256)` of images `(3, H, W)` uint8, resized to 64 x 64 pixels where they differ."""
        return self.scene_classifier.embed(torch.stack([resize_to_scene(image) for image in images]))

    def compare_scenes(self, generated: Sequence[Path], originals: Sequence[Path]) -> Measured:
        """How well the scenes of generated images agree with those of their originals, both as the classifier reads
        them. See `scene_agreement.measure_agreement`.
        """
        return measure_agreement(self._read(generated), self._read(originals))

    def _read(self, paths: Sequence[Path]) -> list[Scene]:
        scenes: list[Scene] = []
        for start in range(0, len(paths), BATCH_SIZE):
            images = [resize_to_scene(load_rgb(path)) for path in paths[start : start + BATCH_SIZE]]
            scenes += self.scene_classifier.predict_scenes(torch.stack(images))
        return scenes


def resize_to_scene(image: torch.Tensor) -> torch.Tensor:
    """An image `(3, H, W)` uint8 of any size as `(3, 64, 64)` uint8."""
    if image.shape[1:] == (64, 64):
        return image
    pixels = F.interpolate(image[None].float(), (64, 64), mode="bilinear", antialias=True)[0]
    return pixels.round().clamp(0, 255).to(torch.uint8)


class SceneClassifierLoss(nn.Module):
    """Cross-entropy of the object at each place (or none), of the sizes of objects, and of the background."""

    def __init__(self, scene_classifier: SceneClassifier):
        super().__init__()
        self.scene_classifier = scene_classifier

    def forward(
        self, pixels: torch.Tensor, objects: torch.Tensor, sizes: torch.Tensor, background: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        object_logits, size_logits, background_logits = self.scene_classifier(pixels)
        loss = (
            F.cross_entropy(object_logits.flatten(0, 1), objects.flatten())
            + F.cross_entropy(size_logits.flatten(0, 1), sizes.flatten(), ignore_index=-100)
            + F.cross_entropy(background_logits, background)
        )
        return {"loss": loss}


def collate_scenes(items: list[dict]) -> dict[str, torch.Tensor]:
    """The arguments of `SceneClassifierLoss.forward`.

    Returns:
        `pixels` `(B, 3, 64, 64)` uint8 and class indices: `objects` `(B, 5)` (`ABSENT` at empty places), `sizes`
        `(B, 5)` (-100 at empty places) and `background` `(B,)`.
    """
    objects = torch.full((len(items), len(PLACES)), ABSENT)
    sizes = torch.full((len(items), len(PLACES)), -100)
    for row, item in enumerate(items):
        for o in item["scene"].objects:
            column = PLACES.index(o.place)
            objects[row, column] = OBJECTS.index(o.name)
            sizes[row, column] = SIZES.index(o.size)
    background = torch.tensor([COLOURS.index(item["scene"].background) for item in items])
    pixels = torch.stack([item["pixels"] for item in items])
    return {"pixels": pixels, "objects": objects, "sizes": sizes, "background": background}


def train_scene_classifier(
    path: str | Path, work_dir: str | Path, images: int = 60_000, evaluation_images: int = 500, seed: int = 0
) -> None:
    """Trains the scene classifier on rendered scenes of any kind and saves it to `path`."""
    torch.manual_seed(seed)
    scene_classifier = SceneClassifier()
    train_module(
        SceneClassifierLoss(scene_classifier),
        SceneDataset(images, split=None, seed=seed + 500, fields=("pixels", "scene")),
        work_dir,
        batch_size=64,
        learning_rate=2e-3,
        data_collator=collate_scenes,
        seed=seed,
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    scene_classifier.save(path)
    saved = SceneClassifier.load(path)
    for split in ("test", "combo"):
        print(f"scene classifier on {split}: {measure_scene_classifier(saved, split, evaluation_images)}")


def measure_scene_classifier(scene_classifier: SceneClassifier, split: str, n: int = 500) -> dict[str, float]:
    """Scores, as of `score_scenes`, of the scene classifier itself on rendered images of a split."""
    pixels, scenes = evaluation_items(split, n)
    return score_scenes(scene_classifier.predict_scenes(pixels), scenes)
