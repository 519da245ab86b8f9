"""Captions of scenes: a grammar that writes them, and a parser that reads them back into scenes."""

import random
import re

from .world import BACKGROUNDS, OBJECTS, PLACES, SIZES, Scene, SceneObject

MAX_WORDS = 46  # commas and full stops counted: 48 text-encoder positions less begin and end
PREPOSITIONS = dict.fromkeys(PLACES, ("at the", "in the", "on the")) | {"centre": ("at the", "in the")}
OPENINGS = ("", "", "there is ", "a picture of ", "we see ")
ENDINGS = (
    "{objects}, on a {background} background",
    "{objects} on a {background} background",
    "{objects}, against a {background} background",
    "{objects}, the scene has a {background} background",
)
BEGINNINGS = (
    "on a {background} background, {objects}",
    "a {background} background with {objects}",
)
_OBJECT = re.compile(
    rf"\b({'|'.join(SIZES)}) ({'|'.join(OBJECTS)}) (?:at|in|on) (?:the )?({'|'.join(PLACES)})\b", re.IGNORECASE
)
_BACKGROUND = re.compile(rf"\b({'|'.join(sorted(BACKGROUNDS, key=len, reverse=True))}) background\b", re.IGNORECASE)


def write_caption(scene: Scene, rng: random.Random | None = None) -> str:
    """A sentence that states exactly what the scene holds, objects in the order of places.

    Args:
        scene: What to describe. Without a background, or without objects, the sentence is silent about them; a scene
            of neither has an empty caption.
        rng: Draws the phrasing; without it the plain sentence is written, e.g. "a large apple at the top left and a
            small dog at the bottom right, on a light blue background".

    Returns:
        At most `MAX_WORDS` words, commas counted.
    """
    chosen = rng or _First()
    preposition = {place: chosen.choice(options) for place, options in PREPOSITIONS.items()}
    parts = [f"a {o.size} {o.name} {preposition[o.place]} {o.place}" for o in scene.objects]
    objects = chosen.choice((" and ", ", and ", ", ")).join(parts[-2:])
    if len(parts) > 2:
        objects = ", ".join([*parts[:-2], objects])
    if not scene.objects:
        return f"a {scene.background} background" if scene.background else ""
    if scene.background is None:
        return chosen.choice(OPENINGS) + objects
    template = chosen.choice(ENDINGS if chosen.random() < 0.6 else BEGINNINGS)
    if template in ENDINGS:
        objects = chosen.choice(OPENINGS) + objects
    return template.format(objects=objects, background=scene.background)


def parse_caption(caption: str) -> Scene:
    """What a caption says: every `<size> <object> <preposition> [the] <place>` and the first `<colour> background`.

    Objects come in the order of `PLACES`, whatever the order of the sentence; whatever else the caption holds is
    passed over, so a caption that says nothing of the world gives an empty scene with background None.
    """
    objects = [SceneObject(*reversed_order) for reversed_order in _read_objects(caption)]
    objects.sort(key=lambda o: PLACES.index(o.place))
    background = _BACKGROUND.search(" ".join(caption.split()))
    return Scene(background.group(1).lower() if background else None, tuple(objects))


def _read_objects(caption: str) -> list[tuple[str, str, str]]:
    found = _OBJECT.findall(" ".join(caption.split()))
    return [(name.lower(), size.lower(), place.lower()) for size, name, place in found]


class _First:
    """Stands in for `random.Random` where the plain phrasing is wanted: always the first choice."""

    def choice(self, options):
        return options[0]

    def random(self) -> float:
        return 0.0
