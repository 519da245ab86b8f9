"""Instructions to the miniature's captioner: what each one asks for, and how well a text does it."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .grammar import parse_caption, write_caption
from .world import BACKGROUNDS, OBJECTS, PLACES, SIZES, Scene, SceneObject

Facts = Counter[tuple[str, ...]]
"""What a text states: an object with some of name, size and place, as often as it occurs, and the background."""

_NAME, _SIZE, _PLACE = ("|".join(options) for options in (OBJECTS, SIZES, PLACES))
_COLOUR = "|".join(BACKGROUNDS)


@dataclass(frozen=True)
class Instruction:
    """An instruction, the text that it asks for, and the parser of that text.

    Attributes:
        text: The instruction.
        write: The text for a scene.
        parse: What a text states; None if it does not have the form that the instruction asks for.
        facts: What the text for a scene states.
    """

    text: str
    write: Callable[[Scene], str]
    parse: Callable[[str], Facts | None]
    facts: Callable[[Scene], Facts]


def _facts(objects: Sequence[tuple[str, ...]], background: str | None = None) -> Facts:
    return Counter([*objects, *([(background,)] if background else [])])


def _all_facts(scene: Scene) -> Facts:
    return _facts([(o.name, o.size, o.place) for o in scene.objects], scene.background)


def _listed(phrases: Sequence[str]) -> str:
    """`"x"`, `"x and y"`, `"x, y and z"`."""
    return " and ".join([*([", ".join(phrases[:-1])] if phrases[1:] else []), *phrases[-1:]])


def _parse_list(text: str, pattern: str, join: Callable[[Sequence[str]], str]) -> list[tuple[str, ...]] | None:
    """The groups of each phrase of a list; None if a phrase is another, or the list is not joined as `join` does."""
    phrases = re.split(", | and ", text)
    found = [re.fullmatch(pattern, phrase) for phrase in phrases]
    if join(phrases) != text or None in found:
        return None
    return [match.groups() for match in found if match]


def _write_briefly(scene: Scene) -> str:
    return _listed([f"a {o.size} {o.name}" for o in scene.objects])


def _parse_briefly(text: str) -> Facts | None:
    found = _parse_list(text, f"a ({_SIZE}) ({_NAME})", _listed)
    return None if found is None else _facts(found)


def _write_in_detail(scene: Scene) -> str:
    sentences = [f"there is a {o.size} {o.name} at the {o.place}." for o in scene.objects]
    return " ".join([*sentences, f"the scene has a {scene.background} background."])


def _parse_in_detail(text: str) -> Facts | None:
    sentence = rf"there is a ({_SIZE}) ({_NAME}) at the ({_PLACE})\. "
    if not re.fullmatch(rf"({sentence})+the scene has a ({_COLOUR}) background\.", text):
        return None
    return _all_facts(parse_caption(text))


def _write_objects(scene: Scene) -> str:
    return _listed([o.name for o in scene.objects])


def _parse_objects(text: str) -> Facts | None:
    found = _parse_list(text, f"({_NAME})", _listed)
    return None if found is None else _facts(found)


def _write_tags(scene: Scene) -> str:
    return ", ".join([*(f"{o.size} {o.name}" for o in scene.objects), f"{scene.background} background"])


def _parse_tags(text: str) -> Facts | None:
    found = _parse_list(text, f"({_SIZE}) ({_NAME})|({_COLOUR}) background", ", ".join)
    return None if found is None else Counter(tuple(part for part in groups if part) for groups in found)


def _write_json(scene: Scene) -> str:
    objects = [{"name": o.name, "size": o.size, "place": o.place} for o in scene.objects]
    return json.dumps({"objects": objects, "background": scene.background})


def _parse_json(text: str) -> Facts | None:
    try:
        value: Any = json.loads(text)
        objects = [SceneObject(**entry) for entry in value.pop("objects")]
        background = value.pop("background")
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    parts = [part for o in objects for part in (o.name, o.size, o.place)] + [background]
    if value or not all(isinstance(part, str) for part in parts):
        return None
    return _all_facts(Scene(background, tuple(objects)))


def _parse_caption(text: str) -> Facts | None:
    scene = parse_caption(text)
    return _all_facts(scene) if scene.objects and scene.background else None


NONE = Instruction("", write_caption, _parse_caption, _all_facts)
BRIEFLY = Instruction(
    "briefly", _write_briefly, _parse_briefly, lambda scene: _facts([(o.size, o.name) for o in scene.objects])
)
IN_DETAIL = Instruction("in detail", _write_in_detail, _parse_in_detail, _all_facts)
ONLY_OBJECTS = Instruction(
    "only the objects", _write_objects, _parse_objects, lambda scene: _facts([(o.name,) for o in scene.objects])
)
AS_TAGS = Instruction(
    "as tags",
    _write_tags,
    _parse_tags,
    lambda scene: _facts([(o.size, o.name) for o in scene.objects], scene.background),
)
AS_JSON = Instruction("as JSON", _write_json, _parse_json, _all_facts)
INSTRUCTIONS = (BRIEFLY, IN_DETAIL, ONLY_OBJECTS, AS_TAGS, AS_JSON)


def score_obedience(instruction: Instruction, texts: Sequence[str], scenes: Sequence[Scene]) -> dict[str, float]:
    """How well texts do what an instruction asks for.

    Args:
        texts: One for each of `scenes`.

    Returns:
        `form`, the share of texts of the right form; `content_f1`, the micro-averaged F1 of what texts state, where a
        text of another form states nothing; `words`, the mean number of words between spaces.

    Raises:
        ValueError: If the lists differ in length or are empty.
    """
    if len(texts) != len(scenes) or not texts:
        raise ValueError(f"expected one text for each scene, and at least one; got {len(texts)} and {len(scenes)}")
    parsed = [instruction.parse(text) for text in texts]
    matches = total = 0
    for found, scene in zip(parsed, scenes, strict=True):
        stated, true = found or Counter(), instruction.facts(scene)
        matches += (stated & true).total()
        total += stated.total() + true.total()
    return {
        "form": round(sum(found is not None for found in parsed) / len(texts), 4),
        "content_f1": round(2 * matches / total, 4),
        "words": round(sum(len(text.split()) for text in texts) / len(texts), 2),
    }
