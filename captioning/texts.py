"""What is done to the text of a caption before it is written, and what a prompt says of its image."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from vlv.errors import UserError

from .choices import LENGTHS, MIN_LOOP_WORDS, MIN_REPEATS
from .inputs import Input

FIELDS = ("name", "folder", "caption", "tags")
"""What a prompt may say of its image."""
_FIELD = re.compile(r"\{(\w*)\}")


def end_of_first_pass(text: str) -> int | None:
    """Where the first pass of a loop ends, in characters; None for a text that does not repeat itself.

    Words count without capitals and punctuation. Of several loops the one that begins first counts.
    """
    words = list(re.finditer(r"\S+", text))
    plain = [word[0].strip(".,;:!?").casefold() for word in words]
    best: tuple[int, int] | None = None
    for period in range(1, len(plain) // MIN_REPEATS + 1):
        needed = max(MIN_REPEATS * period, MIN_LOOP_WORDS) - period  # words that equal the one a period before
        equal = 0
        for place in range(period, len(plain)):
            equal = equal + 1 if plain[place] == plain[place - period] else 0
            if equal == needed:
                start = place - period - equal + 1
                best = min(best or (start, period), (start, period))
                break
    return None if best is None else words[sum(best) - 1].end()


@dataclass
class CaptionEditor:
    """Edits captions before they are written; counts those that repeat themselves.

    Args:
        loop_guard: Whether a caption that repeats itself is cut after the first pass.
        prefix, suffix: Stand before and behind each caption, as they are.
        trigger_word: Stands before each caption that does not have it, with a comma.
    """

    loop_guard: bool = False
    prefix: str = ""
    suffix: str = ""
    trigger_word: str = ""
    counts: Counter[str] = field(default_factory=Counter)

    def recorded(self) -> dict[str, Any]:
        """The settings for a record of the run, without those that change nothing."""
        settings = {name: getattr(self, name) for name in ("loop_guard", "prefix", "suffix", "trigger_word")}
        return {name: value for name, value in settings.items() if value}

    def edit(self, entry: Any) -> Any:
        """A result (caption, list of captions, or object with `caption`) with its captions edited."""
        if isinstance(entry, dict):
            return entry | {"caption": self.edit(entry["caption"])}
        return [self._edit(text) for text in entry] if isinstance(entry, list) else self._edit(entry)

    def cut(self, text: str) -> str:
        """A caption without its repetitions, if `loop_guard` says so. Counts captions that repeat themselves."""
        end = end_of_first_pass(text)
        if end is None:
            return text
        self.counts["loops"] += 1
        return text[:end].rstrip(",;: ") if self.loop_guard else text

    def _edit(self, text: str) -> str:
        text = self.cut(text)
        if self.trigger_word and not re.search(rf"(?<!\w){re.escape(self.trigger_word)}(?!\w)", text):
            text = f"{self.trigger_word}, {text}" if text else self.trigger_word
        return f"{self.prefix}{text}{self.suffix}"

    def notes(self) -> list[str]:
        """A sentence for the user about captions that repeat themselves, if there are any."""
        if not (count := self.counts["loops"]):
            return []
        what = "cut after the first pass" if self.loop_guard else "left as they are; --loop-guard cuts them"
        return [f"note: {count} captions repeat themselves over and over, {what}"]


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt with fields such as `{name}` that differ from image to image.

    Args:
        text: The prompt.
        read_sidecar: Returns the caption, or the tags, that lie beside an image; "" if there are none.
    """

    text: str
    read_sidecar: Callable[[Input, str], str]

    def render(self, item: Input) -> str:
        """The prompt of an image. Raises `ValueError` if a value cannot be read, or is not Unicode."""
        try:
            text = _FIELD.sub(lambda match: self._value(match[1], item), self.text).strip()
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{text!r:.80} is not UTF-8") from error
        except OSError as error:
            raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from error
        return text

    def _value(self, name: str, item: Input) -> str:
        place = PurePosixPath(item.path.absolute().as_posix() if item.is_file else item.name)
        if name in ("name", "folder"):
            return place.stem if name == "name" else place.parent.name
        return self.read_sidecar(item, name)


def prompt_fields(prompt: str | None) -> list[str]:
    """The fields of a prompt. Raises `UserError` if one is not known."""
    fields = _FIELD.findall(prompt or "")
    for name in fields:
        if name not in FIELDS:
            known = ", ".join(f"{{{known}}}" for known in FIELDS)
            raise UserError(f"--prompt has {{{name}}}; a prompt may say {known} of its image")
    return fields


def instruction_of_length(length: str, instructions: Sequence[str] | None, source: str) -> str:
    """The instruction of a model that asks for captions of a length.

    Args:
        length: A key of `choices.LENGTHS`.
        instructions: Those that the model was trained to follow.
        source: The model, for messages.

    Raises:
        UserError: If no instruction asks for it, or several do.
    """
    asking = [text for text in instructions or [] if set(re.findall(r"\w+", text.lower())) & set(LENGTHS[length])]
    if len(asking) == 1:
        return asking[0]
    if asking:
        several = ", ".join(map(repr, asking))
        raise UserError(f"--length {length} may mean {several} to {source}; pass one of them by --prompt")
    known = ", ".join(map(repr, instructions)) if instructions else "none"
    raise UserError(
        f"--length {length} needs a model that was trained with an instruction such as {LENGTHS[length][0]!r}; "
        f"{source} records {known}. --max-new-tokens limits captions of any model"
    )
