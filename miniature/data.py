"""Rendered scenes as data sets, for training and evaluation."""

import random

import torch
from torch.utils.data import Dataset

from .grammar import write_caption
from .render import render
from .world import Scene, sample_scenes

EVALUATION_SEED = 23


class SceneDataset(Dataset):
    """`length` scenes of a split. Each is sampled, rendered and described from its index, so items are reproducible.

    An item is a dict of `pixels` (a `(3, 64, 64)` uint8 tensor), `scene` and `caption`.

    Args:
        length: Number of scenes.
        split: A split of `world.SPLITS`, or None for scenes of any kind.
        seed: Data sets with different seeds have different scenes.
        fields: The keys that an item has.
        partial_captions: The share of scenes whose caption is partial: it mentions each object, and the background,
            with a probability of one half.
    """

    def __init__(
        self,
        length: int,
        split: str | None = "train",
        seed: int = 0,
        fields: tuple[str, ...] = ("pixels",),
        partial_captions: float = 0.0,
    ):
        self.length, self.split, self.seed, self.fields = length, split, seed, fields
        self.partial_captions = partial_captions

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.length:
            raise IndexError(index)
        rng = random.Random(f"{self.seed}/{self.split}/{index}")
        scene = next(sample_scenes(rng, self.split))
        item: dict = {}
        if "pixels" in self.fields:
            item["pixels"] = torch.from_numpy(render(scene, rng)).permute(2, 0, 1)
        if "caption" in self.fields:
            described = partial_scene(scene, rng) if rng.random() < self.partial_captions else scene
            item["caption"] = write_caption(described, rng)
        if "scene" in self.fields:
            item["scene"] = scene
        return item


def partial_scene(scene: Scene, rng: random.Random) -> Scene:
    """The scene with each object, and the background, kept with a probability of one half: for a partial caption."""
    objects = tuple(o for o in scene.objects if rng.random() < 0.5)
    return Scene(scene.background if rng.random() < 0.5 else None, objects)


def evaluation_items(split: str, n: int) -> tuple[torch.Tensor, list[Scene]]:
    """The first `n` images `(n, 3, 64, 64)` uint8 of a split for evaluation, and their scenes."""
    data = SceneDataset(n, split=split, seed=EVALUATION_SEED, fields=("pixels", "scene"))
    items = [data[i] for i in range(n)]
    return torch.stack([item["pixels"] for item in items]), [item["scene"] for item in items]
