"""The emoji world: what a scene can contain, how scenes are sampled, and which split a scene belongs to.

A split depends on the content of a scene, never on a seed, so a scene is in the same split in every process:

- an (object, background, place) triple is *held out* when `(7 * object + 3 * background + 5 * place) % 10 == 0`,
  each numbered from 0 in the order of the tuples below;
- `combo`: every object of the scene is in a held-out triple;
- `test`: no held-out triple, and the first byte of the sha256 of the scene's canonical text is below 26;
- `train`: all other scenes without a held-out triple;
- a scene with both held-out and other triples is in no split.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

CODEPOINTS = {
    "apple": "1F34E",
    "dog": "1F436",
    "car": "1F697",
    "sun": "2600",
    "fish": "1F420",
    "tree": "1F332",
    "heart": "2764",
    "banana": "1F34C",
    "house": "1F3E0",
    "cat": "1F431",
    "frog": "1F438",
    "umbrella": "2602",
    "mushroom": "1F344",
    "rocket": "1F680",
    "butterfly": "1F98B",
    "snowman": "26C4",
}
OBJECTS = tuple(CODEPOINTS)
SIZES = ("small", "large")
PLACES = ("top left", "top right", "bottom left", "bottom right", "centre")
CORNERS = PLACES[:4]
BACKGROUNDS = {
    "light blue": (173, 216, 240),
    "white": (250, 250, 250),
    "pink": (250, 190, 205),
    "yellow": (250, 232, 130),
    "light green": (180, 230, 170),
    "grey": (165, 165, 165),
    "dark blue": (35, 50, 110),
    "purple": (150, 110, 190),
}
COLOURS = tuple(BACKGROUNDS)
MAX_OBJECTS = 3
SPLITS = ("train", "test", "combo")


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene: its name, its size and its place."""

    name: str
    size: str
    place: str


@dataclass(frozen=True)
class Scene:
    """A background colour (None if a caption names none) and objects in the order of `PLACES`."""

    background: str | None
    objects: tuple[SceneObject, ...]

    @property
    def text(self) -> str:
        """The canonical text. Equal scenes have equal texts; `split` is computed from it."""
        objects = "; ".join(f"{o.size} {o.name} {o.place}" for o in self.objects)
        return f"{self.background}: {objects}"

    def split(self) -> str | None:
        """`"train"`, `"test"`, `"combo"`, or None for a scene that mixes held-out and other triples."""
        held_out = [is_held_out(o.name, self.background, o.place) for o in self.objects]
        if any(held_out):
            return "combo" if all(held_out) else None
        return "test" if hashlib.sha256(self.text.encode()).digest()[0] < 26 else "train"


def is_held_out(name: str, background: str | None, place: str) -> bool:
    """Whether only the scene classifier may be trained on this combination of object, background and place."""
    if background is None:
        return False
    number = 7 * OBJECTS.index(name) + 3 * COLOURS.index(background) + 5 * PLACES.index(place)
    return number % 10 == 0


def random_scene(rng: random.Random, n_objects: int) -> Scene:
    """A scene of any split with `n_objects` objects, sampled uniformly. Only a single object can be at the centre."""
    places = [rng.choice(PLACES)] if n_objects == 1 else sorted(rng.sample(CORNERS, n_objects), key=PLACES.index)
    objects = tuple(SceneObject(OBJECTS[rng.randrange(len(OBJECTS))], rng.choice(SIZES), place) for place in places)
    return Scene(rng.choice(COLOURS), objects)


def sample_scenes(rng: random.Random, split: str | None = "train", n_objects: int | None = None) -> Iterator[Scene]:
    """An endless stream of scenes of a split, sampled with replacement.

    Args:
        rng: The source of randomness. The same state gives the same scenes.
        split: One of `SPLITS`, or None for scenes of any kind (for the scene classifier only).
        n_objects: The number of objects. By default each scene has 1 to 3, with equal probability.

    Raises:
        ValueError: If `split` is not one of `SPLITS`.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS} or None, not {split!r}")
    while True:
        count = n_objects or rng.randint(1, MAX_OBJECTS)
        scene = random_scene(rng, count)
        while split is not None and scene.split() != split:
            scene = random_scene(rng, count)
        yield scene
