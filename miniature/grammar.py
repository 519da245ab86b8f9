"""Captions of scenes: a grammar that writes them and a parser that turns them back into scenes."""

import random
import re

from .world import BACKGROUNDS, OBJECTS, PLACES, SIZES, Scene, SceneObject

MAX_WORDS = 46  # with commas and full stops: 48 positions of the text encoder, less the begin and end tokens
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
    """A sentence that states exactly what the scene contains, with objects in the order of `PLACES`.

    Args:
        scene: The scene to describe. A background of None and missing objects are not mentioned; a scene with neither
            has an empty caption.
        rng: Chooses the phrasing. Without it the first phrasing is used, such as "a large apple at the top left and a
            small dog at the bottom right, on a light blue background".

    Returns:
        At most `MAX_WORDS` words, where a comma counts as a word.
    """
    chosen = rng or _FirstChoice()
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
    """The scene of a caption: every `<size> <object> <preposition> [the] <place>` and the first `<colour> background`.

    Objects are in the order of `PLACES`, whatever their order in the sentence. The rest of the caption is ignored, so
    a caption without any such phrase gives a scene without objects and with background None.
    """
    objects = [
        SceneObject(name.lower(), size.lower(), place.lower())
        for size, name, place in _OBJECT.findall(" ".join(caption.split()))
    ]
    objects.sort(key=lambda o: PLACES.index(o.place))
    background = _BACKGROUND.search(" ".join(caption.split()))
    return Scene(background.group(1).lower() if background else None, tuple(objects))


class _FirstChoice:
    """Takes the place of `random.Random` and always makes the first choice."""

    def choice(self, options):
        return options[0]

    def random(self) -> float:
        return 0.0
