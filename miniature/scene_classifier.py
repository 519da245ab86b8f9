"""The independent judge: a small CNN that reads a scene out of a picture.

It is trained on rendered scenes alone, of every split (it is the one part that may be), so no part of the system it
judges ever touched it. Its own accuracy on `test` and `combo` stands beside every figure that it gives.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from .training import SceneDataset, train_module
from .world import COLOURS, OBJECTS, PLACES, SIZES, Scene, SceneObject

ABSENT = len(OBJECTS)  # the class of a place where nothing is


class SceneClassifier(nn.Module):
    """For each place an object (or none) and its size, and one background colour."""

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
        features = self.features(pixels.float() / 127.5 - 1).flatten(1)  # (B, width * 64)
        hidden = F.relu(self.hidden(features))  # (B, 256)
        objects = self.objects(hidden).unflatten(1, (len(PLACES), -1))
        sizes = self.sizes(hidden).unflatten(1, (len(PLACES), -1))
        return objects, sizes, self.background(hidden)

    @torch.no_grad()
    def read(self, pixels: torch.Tensor) -> list[Scene]:
        """The scene in each of `(B, 3, 64, 64)` uint8 pictures."""
        was_training, _ = self.training, self.eval()
        scenes = []
        for chunk in pixels.split(256):
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
        """Half precision: the judge's weights are shipped, its figures are taken from the shipped ones."""
        save_file({name: t.half() if t.is_floating_point() else t for name, t in self.state_dict().items()}, path)

    @classmethod
    def load(cls, path: str | Path) -> "SceneClassifier":
        """Raises `FileNotFoundError` where there is no such file."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"no scene classifier at {path}; `make miniature` trains one")
        model = cls()
        model.load_state_dict({n: t.float() if t.is_floating_point() else t for n, t in load_file(path).items()})
        return model.eval()


class SceneClassifierLoss(nn.Module):
    """Cross-entropy of objects (with absence), sizes of the objects that are there, and background."""

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
    """Pictures, `objects` (B, 5), `sizes` (B, 5; -100 where nothing is) and `background` (B)."""
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


def train_scene_classifier(path: str | Path, work_dir: str | Path, images: int = 60_000, seed: int = 0) -> None:
    """Trains the judge on rendered scenes of any kind and saves it to `path`."""
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
    judge = SceneClassifier.load(path)
    for split in ("test", "combo"):
        print(f"scene classifier on {split}: {measure_scene_classifier(judge, split)}")


def measure_scene_classifier(scene_classifier: SceneClassifier, split: str, n: int = 500) -> dict[str, float]:
    """What the judge reads out of clean renderings of a split, scored like everything that it judges."""
    from .scoring import score_scenes

    data = SceneDataset(n, split=split, seed=23, fields=("pixels", "scene"))
    items = [data[i] for i in range(n)]
    pixels = torch.stack([item["pixels"] for item in items])
    return score_scenes(scene_classifier.read(pixels), [item["scene"] for item in items])
