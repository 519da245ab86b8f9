"""Whether a teacher's answer is a caption: refusals and malformed answers are told apart, with the reason."""

import re
from dataclasses import dataclass

from vlv.evaluation.answer_log import EMPTY, Answer

CAPTIONED, REFUSED, MALFORMED, FAILED, UNREADABLE = "captioned", "refused", "malformed", "failed", "unreadable"
STATUSES = (CAPTIONED, REFUSED, MALFORMED, FAILED, UNREADABLE)
_MODEL = r"(?:(?:large|text-based|multimodal|visual|vision|mere) )*(?:language model|ai\b|artificial intelligence)"
_REFUSALS = re.compile(
    r"(?:i'?m|i am) (?:(?:really |very |so )?sorry|unable|afraid|not (?:able|allowed|permitted|programmed|designed))\b"
    r"|(?:sorry|(?:my )?apologies|i apologi[sz]e)\b[,.!]? (?:but )?i\b"
    r"|(?:my apologies|i apologi[sz]e)\b,? but\b"
    r"|i (?:can'?t|cannot|can not|won'?t|will not) (?:help|assist|be able|describe|identify|provide|process|view|see|"
    r"fulfil|create|generate|produce|comply|analy[sz]e|answer|complete|engage|discuss|access|open|"
    r"display|do (?:that|this)\b)"
    r"|i(?:'d| would)? (?:must |have to |need to |respectfully )*decline\b"
    rf"|(?:as|(?:i'?m|i am)(?: just| only| merely)?) an? {_MODEL}"
    r"|i (?:don'?t|do not|didn'?t|did not|can'?t|cannot) (?:actually |currently )?(?:see|have|receive|find|get) "
    r"(?:an?|any|the|your) (?:\w+ )?(?:image|picture|photo|attachment|access|ability)"
    r"|(?:there is|there's|i see|i have) no (?:image|picture|photo|attachment)\b"
    r"|no (?:image|picture|photo|attachment) (?:was|is|has been) (?:attached|provided|uploaded|included|sent|shared)"
    r"|it (?:looks|seems|appears) (?:like |that |as if )?(?:you (?:haven't|have not|didn't|did not|forgot)|no image\b)"
    r"|please (?:upload|attach|provide|share|send) (?:me )?(?:an?|the|your|another) (?:\w+ )?(?:image|picture|photo)"
    r"|unfortunately,? i\b",
    re.IGNORECASE,
)
_MARKUP = re.compile(r"[{\[<]|.*```")
_FINAL_STATUS = re.compile(r"status (400|413|414|422)\b")  # the same request has the same answer
_POLICY = re.compile(r"content.?(policy|filter|management)|safety|moderation|responsible.?ai", re.IGNORECASE)
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
    """Says whether an answer is a caption.

    A caption is text that ends by itself, has at least `min_words` words, begins neither as a refusal nor as JSON or
    HTML, has no code fence, and does not repeat itself (of at least 24 words, half of the runs of four words are
    different). Line breaks become spaces. An image that the endpoint does not take (400, 413, 414, 422) is refused or
    malformed; other errors are failures.
    """
    if answer.error is not None:
        if answer.error.startswith("refused"):
            return Checked(REFUSED, "", answer.error)
        if _FINAL_STATUS.match(answer.error):
            return Checked(REFUSED if _POLICY.search(answer.error) else MALFORMED, "", answer.error)
        if answer.error == EMPTY:
            return Checked(MALFORMED, "", answer.error)
        return Checked(FAILED, "", answer.error)
    text = " ".join((answer.text or "").split())
    words = text.split()
    if answer.finish_reason == "content_filter":
        return Checked(REFUSED, text, "stopped by a content filter")
    if _MARKUP.match(text):
        return Checked(MALFORMED, text, "is JSON, HTML or code")
    if _REFUSALS.match(text.replace("’", "'")):
        return Checked(REFUSED, text, "begins as a refusal")
    if answer.finish_reason == "length":
        return Checked(MALFORMED, text, "cut at max_tokens")
    if len(words) < min_words:
        return Checked(MALFORMED, text, f"{len(words)} words, fewer than {min_words}")
    runs = [tuple(words[place : place + _NGRAM]) for place in range(len(words) - _NGRAM + 1)]
    if len(words) >= _FEWEST_WORDS and len(set(runs)) < _SHARE * len(runs):
        return Checked(MALFORMED, text, "repeats itself")
    return Checked(CAPTIONED, text)
