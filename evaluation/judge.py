"""A vision model as judge of captions: scores of 0 to 6, and comparisons of two captions in both orders.

The scale is that of the paper's captioner arena (arXiv 2507.07104, appendix D), in words of this project: coverage of
what the image shows, nothing invented, and a layout that agrees with the image.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from .answer_log import Answer
from .endpoint import Endpoint, Question, image_part

SCORES = range(7)
SCORE_PROMPT = """\
You judge how well a caption describes the image. Look at three things: how much of what the image shows the caption \
mentions; whether it mentions anything that the image does not show; and whether it says correctly where things are, \
relative to each other and in the image. A relation that is wrong, invented or guessed counts as invented content. An \
obvious relation that is left out counts as missing content.

6: everything that matters is mentioned, the layout is right, nothing is invented.
5: nearly everything is mentioned, with small gaps; nothing is invented.
4: the main content is mentioned, several things are missing; nothing is invented.
3: little is mentioned, hardly any layout; nothing is invented.
2: a good part is mentioned, but at least one thing is invented or wrong.
1: little is mentioned, and at least one thing is invented or wrong.
0: nothing useful is mentioned, or several things are invented.

Caption:
{caption}

Explain in one or two sentences, then end with a line of the form
Score: N"""
COMPARISON_PROMPT = """\
Two captions describe the same image. Decide which describes it better: it mentions more of what the image shows, \
says more correctly where things are, and invents less. A caption is not better because it is longer.

Caption 1:
{first}

Caption 2:
{second}

Explain in one or two sentences, then end with one line of the form
Better: 1
or
Better: 2
or
Better: equal"""
_NUMBER = r"-?\d+(?:[.,]\d+)?"
# A number with all that belongs to it: 4, 4/6, 5 out of 10, 3 to 4, 80%.
_RATING = rf"{_NUMBER}(?:\s*(?:/|(?:out\s+)?of\b|[-–—]|to\b|or\b)\s*{_NUMBER})*\s?%?"
_SCORE = re.compile(rf"\bscore\b[^\w-]{{0,6}}(?:is|of|would be)?[^\w-]{{0,4}}(?P<verdict>{_RATING}\w*)", re.IGNORECASE)
_RATING_ANYWHERE = re.compile(rf"(?<![\w.,/-])(?P<verdict>{_RATING}\w*)", re.IGNORECASE)
_RATING_ALONE = re.compile(rf"^[^\w-]*(?:-\s+)?(?P<verdict>{_RATING})\W*\Z", re.IGNORECASE | re.MULTILINE)
_OUT_OF_SIX = re.compile(rf"({_NUMBER})\s*(?:/|out\s+of)\s*6(?:\.0+)?", re.IGNORECASE)
_SCALE = re.compile(r"0\s*(?:[-–—]|to)\s*6", re.IGNORECASE)
_CHOICE = r"(?:caption\s*(?:1|2|one|two)|1|2|first|second|equal|tie|both|neither)\b"
# A choice with all that belongs to it: 2, caption 1, 1 or 2.
_CHOSEN = rf"{_CHOICE}(?:\.\d+|\s*(?:/|[-–—]|or\b|and\b|to\b)\s*{_CHOICE})*"
_BETTER = re.compile(
    r"\b(?:better|winner|best|prefer(?:red)?|answer|verdict)\b[^\w.!?;]{0,6}(?:is|one is|caption is)?[^\w.!?;]{0,4}"
    rf"(?:the\s+)?(?P<verdict>{_CHOSEN})",
    re.IGNORECASE,
)
_CHOICE_ALONE = re.compile(rf"^\W*(?P<verdict>{_CHOSEN})\W*\Z", re.IGNORECASE | re.MULTILINE)
_CHOICE_OF_FIELD = re.compile(rf"\W*(?:the\s+)?({_CHOSEN})\s*(?:[(:,.;-].*)?", re.IGNORECASE | re.DOTALL)
_CHOICES = {"1": 1, "one": 1, "first": 1, "2": 2, "two": 2, "second": 2, "equal": 0, "tie": 0, "both": 0, "neither": 0}


def parse_score(text: str) -> int | None:
    """The score in a judge's answer, or None if it gives no whole number from 0 to 6.

    Reads a last line `Score: 4`, `**Score:** 4/6`, `4 out of 6`, JSON with a field `score`, and a number alone. The
    last of them counts, because judges repeat the scale first. It gives no score if it is a range, or out of another
    number than 6.
    """
    found, text = _take_json_fields(text, "score")
    found += [match for pattern in (_SCORE, _RATING_ALONE) for match in _matches(pattern, text)]
    found += [match for match in _matches(_RATING_ANYWHERE, text) if _OUT_OF_SIX.fullmatch(match[1])]
    given = [(position, str(value).strip()) for position, value in found]
    given = [(position, value) for position, value in given if not _SCALE.fullmatch(value)]
    if not given:
        return None
    last = max(given)[1]
    out_of_six = _OUT_OF_SIX.fullmatch(last)
    with suppress(ValueError):
        value = float(out_of_six.group(1) if out_of_six else last)
        return int(value) if value in SCORES else None
    return None


def parse_comparison(text: str) -> int | None:
    """1 or 2 for the better caption, 0 for none, or None if a judge's answer does not say.

    Reads a last line `Better: 2`, `**Better:** caption 2`, JSON with a field `better`, and `1`, `2` or `equal` alone.
    The last of them counts. It gives no choice if it names several, such as `1 or 2`.
    """
    fields, text = _take_json_fields(text, "better")
    given = [(position, _choice_of_field(value)) for position, value in fields]
    given += [match for pattern in (_BETTER, _CHOICE_ALONE) for match in _matches(pattern, text)]
    if not given:
        return None
    return _CHOICES.get(max(given)[1].lower().removeprefix("caption").strip())


def _choice_of_field(value: Any) -> str:
    """The choice that a field's value begins with, as in `Caption 2 (more detail)`; else an empty text."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    found = _CHOICE_OF_FIELD.fullmatch(str(value))
    return found.group(1) if found else ""


def _matches(pattern: re.Pattern, text: str) -> list[tuple[int, str]]:
    """Position and text of each verdict that a pattern finds."""
    return [(match.start("verdict"), match.group("verdict")) for match in pattern.finditer(text)]


def _take_json_fields(text: str, name: str) -> tuple[list[tuple[int, Any]], str]:
    """Position and value of a field in each JSON object that has it, and the text without these objects.

    The text is of the same length, without Markdown's marks.
    """
    found, position = [], 0
    while (position := text.find("{", position)) >= 0:
        try:
            content, end = json.JSONDecoder().raw_decode(text, position)
        except (ValueError, RecursionError):
            content, end = {}, position
        fields = {key.lower(): value for key, value in content.items()}
        if name not in fields:
            position += 1
            continue
        found.append((position, fields[name]))
        text = text[:position] + " " * (end - position) + text[end:]
        position = end
    return found, re.sub(r"[*_`#]", " ", text)


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one image.

    Attributes:
        name: Of the image.
        value: A score, or the share of the two orders that the first captioner wins (0, 0.5 or 1; ties count half).
        orders_agree: Of comparisons: whether both orders have the same winner.
    """

    name: str
    value: float
    orders_agree: bool | None = None


@dataclass(frozen=True)
class Judgement:
    """All verdicts, and the images without one, each with the reason."""

    verdicts: list[Verdict]
    failed: dict[str, str]


def score_captions(
    endpoint: Endpoint,
    captions: Mapping[str, str],
    read_image: Callable[[str], bytes],
    advance: Callable[[int], None] = lambda done: None,
) -> Judgement:
    """A score of 0 to 6 for each caption.

    Args:
        captions: By name of the image.
        read_image: The bytes of the file of an image.

    Raises:
        EndpointError, PriceReached: As [`Endpoint.ask`].
    """
    questions = (
        Question(f"score/{name}", _messages(read_image(name), SCORE_PROMPT.format(caption=caption)))
        for name, caption in captions.items()
    )
    verdicts, failed = [], {}
    for name, answer in zip(captions, endpoint.ask(questions, advance), strict=True):
        value = None if answer.text is None else parse_score(answer.text)
        if value is None:
            failed[name] = _reason(answer, "score from 0 to 6")
        else:
            verdicts.append(Verdict(name, value))
    return Judgement(verdicts, failed)


def compare_captions(
    endpoint: Endpoint,
    first: Mapping[str, str],
    second: Mapping[str, str],
    read_image: Callable[[str], bytes],
    advance: Callable[[int], None] = lambda done: None,
) -> Judgement:
    """Which of two captions of each image is better, asked in both orders, since judges prefer positions.

    Args:
        first, second: Captions of two captioners, by name of the image. Images of one alone are left out.
    """
    names = [name for name in first if name in second]
    questions = (
        Question(f"{order}/{name}", _messages(read_image(name), COMPARISON_PROMPT.format(first=one, second=other)))
        for name in names
        for order, one, other in (
            ("first-second", first[name], second[name]),
            ("second-first", second[name], first[name]),
        )
    )
    answers = endpoint.ask(questions, advance)
    verdicts, failed = [], {}
    for name, there, back in zip(names, answers[::2], answers[1::2], strict=True):
        choices = [None if own.text is None else parse_comparison(own.text) for own in (there, back)]
        if None in choices:
            failed[name] = _reason([there, back][choices.index(None)], "better caption")
            continue
        wins = [{1: 1.0, 2: 0.0, 0: 0.5}[choices[0]], {1: 0.0, 2: 1.0, 0: 0.5}[choices[1]]]  # type: ignore[index]
        verdicts.append(Verdict(name, sum(wins) / 2, orders_agree=wins[0] == wins[1]))
    return Judgement(verdicts, failed)


def _messages(image: bytes, text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [image_part(image), {"type": "text", "text": text}]}]


def _reason(answer: Answer, expected: str) -> str:
    if answer.error is not None:
        return answer.error
    cut = "; it was cut, raise max_tokens" if answer.finish_reason == "length" else ""
    return f"the answer gives no {expected}: {str(answer.text)[-80:]!r}{cut}"


def weighted_kappa(first: Sequence[int], second: Sequence[int], values: Sequence[int] = SCORES) -> float:
    """Agreement of two judges beyond chance: Cohen's kappa with squared weights (Cohen 1968). 1 is full agreement."""
    if len(first) != len(second) or not first:
        raise ValueError(f"two judges of the same captions are needed, got {len(first)} and {len(second)} scores")
    pairs, ones, others = Counter(zip(first, second, strict=True)), Counter(first), Counter(second)
    span = (max(values) - min(values)) ** 2
    observed = sum(count * (one - other) ** 2 / span for (one, other), count in pairs.items()) / len(first)
    expected = (
        sum(ones[one] * others[other] * (one - other) ** 2 / span for one in ones for other in others)
        / len(first) ** 2
    )
    return 1.0 if expected == 0 else 1 - observed / expected
