"""Scenes that differ from a scene in one fact or more, for captions that are wrong in a known way."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from .world import COLOURS, CORNERS, MAX_OBJECTS, OBJECTS, PLACES, SIZES, Scene, SceneObject


def _change_object(scene: Scene, rng: random.Random, field: str, values: tuple[str, ...]) -> Scene:
    """The scene with another value of a field of one of its objects."""
    number = rng.randrange(len(scene.objects))
    own = scene.objects[number]
    value = rng.choice([value for value in values if value != getattr(own, field)])
    objects = list(scene.objects)
    objects[number] = replace(own, **{field: value})
    return in_order(scene.background, objects)


def in_order(background: str | None, objects: Sequence[SceneObject]) -> Scene:
    """A scene whose objects are given in any order."""
    return Scene(background, tuple(sorted(objects, key=lambda o: PLACES.index(o.place))))


def change_name(scene: Scene, rng: random.Random) -> Scene:
    return _change_object(scene, rng, "name", OBJECTS)


def change_size(scene: Scene, rng: random.Random) -> Scene:
    return _change_object(scene, rng, "size", SIZES)


def change_place(scene: Scene, rng: random.Random) -> Scene:
    """One object is at a place that is empty; only a single object can be at the centre."""
    free = PLACES if len(scene.objects) == 1 else CORNERS
    taken = {o.place for o in scene.objects}
    return _change_object(scene, rng, "place", tuple(place for place in free if place not in taken))


def change_background(scene: Scene, rng: random.Random) -> Scene:
    return replace(scene, background=rng.choice([colour for colour in COLOURS if colour != scene.background]))


def remove_object(scene: Scene, rng: random.Random) -> Scene | None:
    """The scene without one of its objects; None if it has only one."""
    if len(scene.objects) == 1:
        return None
    left_out = rng.randrange(len(scene.objects))
    return replace(scene, objects=tuple(o for number, o in enumerate(scene.objects) if number != left_out))


def invent_object(scene: Scene, rng: random.Random) -> Scene | None:
    """The scene with one more object at an empty corner; None where a scene cannot have it."""
    taken = {o.place for o in scene.objects}
    if len(scene.objects) == MAX_OBJECTS or "centre" in taken:
        return None
    place = rng.choice([place for place in CORNERS if place not in taken])
    return in_order(scene.background, [*scene.objects, SceneObject(rng.choice(OBJECTS), rng.choice(SIZES), place)])


CHANGES: dict[str, Callable[[Scene, random.Random], Scene | None]] = {
    "object": change_name,
    "place": change_place,
    "size": change_size,
    "background": change_background,
    "missing object": remove_object,
    "invented object": invent_object,
}
"""Each makes a scene that differs in one fact, or None where the scene allows no such change."""


def with_wrong_facts(scene: Scene, count: int, rng: random.Random) -> Scene:
    """The scene with `count` wrong facts: names and sizes of its objects, and its background.

    A scene with the same state of `rng` and fewer wrong facts has a part of them.

    Args:
        count: At most twice the number of objects, and one.
    """
    facts = [(number, field) for number in range(len(scene.objects)) for field in ("name", "size")]
    facts.append((-1, "background"))
    rng.shuffle(facts)
    objects, background = list(scene.objects), scene.background
    for number, field in facts[:count]:
        if field == "background":
            background = rng.choice([colour for colour in COLOURS if colour != background])
            continue
        values = OBJECTS if field == "name" else SIZES
        value = rng.choice([value for value in values if value != getattr(objects[number], field)])
        objects[number] = replace(objects[number], **{field: value})
    return Scene(background, tuple(objects))
