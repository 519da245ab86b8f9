"""Whether a teacher's answer is a caption: refusals and malformed answers are told apart, with the reason."""

import re
from dataclasses import dataclass

from vlv.evaluation.endpoint import Answer

CAPTIONED, REFUSED, MALFORMED, FAILED, UNREADABLE = "captioned", "refused", "malformed", "failed", "unreadable"
STATUSES = (CAPTIONED, REFUSED, MALFORMED, FAILED, UNREADABLE)
_REFUSALS = re.compile(
    r"(?:i['’]?m|i am)\s+(?:really |very |so )?(?:sorry|unable|not able)\b"
    r"|(?:sorry|apologies)\b[,.!]?\s+(?:but\s+)?i\b"
    r"|i\s+(?:can['’]?t|cannot|can not|won['’]?t|will not)\s+"
    r"(?:help|assist|describe|identify|provide|process|view|see)\b"
    r"|as an ai\b|unfortunately,? i\b",
    re.IGNORECASE,
)
_NGRAM, _FEWEST_WORDS, _SHARE = 4, 24, 0.5


@dataclass(frozen=True)
class Checked:
    """A teacher's answer.

    Attributes:
        status: Of `STATUSES`.
        text: The caption in one line, or what came in its place.
        reason: Why it is not a caption; "" if it is.
    """

    status: str
    text: str
    reason: str = ""


def check_answer(answer: Answer, min_words: int = 1) -> Checked:
    """Judges an answer.

    A caption is text that ends by itself, has at least `min_words` words, begins as no refusal does, and does not
    repeat itself (of at least 24 words, half of the runs of four words are different). Line breaks become spaces.
    """
    if answer.error is not None:
        if answer.error.startswith("refused"):
            return Checked(REFUSED, "", answer.error)
        if answer.error == "the answer is empty":
            return Checked(MALFORMED, "", answer.error)
        return Checked(FAILED, "", answer.error)
    text = " ".join((answer.text or "").split())
    words = text.split()
    if answer.finish_reason == "content_filter":
        return Checked(REFUSED, text, "stopped by a content filter")
    if _REFUSALS.match(text):
        return Checked(REFUSED, text, "begins as a refusal")
    if answer.finish_reason == "length":
        return Checked(MALFORMED, text, "cut at max_tokens")
    if len(words) < min_words:
        return Checked(MALFORMED, text, f"{len(words)} words, fewer than {min_words}")
    runs = [tuple(words[place : place + _NGRAM]) for place in range(len(words) - _NGRAM + 1)]
    if len(words) >= _FEWEST_WORDS and len(set(runs)) < _SHARE * len(runs):
        return Checked(MALFORMED, text, "repeats itself")
    return Checked(CAPTIONED, text)
