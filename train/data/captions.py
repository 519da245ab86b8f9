"""Which words of an image are its caption: columns, alternatives in lists and lines, and captions without words."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from transformers.utils import logging

logger = logging.get_logger(__name__)

CAPTION_COLUMN, IMAGE_COLUMN, PROMPT_COLUMN = "caption", "image", "prompt"
CAPTION_COLUMNS = (CAPTION_COLUMN, "text", "captions", "texts", "TEXT", "txt")
IMAGE_COLUMNS = (IMAGE_COLUMN, "file_name", "jpg", "png", "webp", "image_path", "filename", "filepath", "path")
URL_COLUMNS = ("url", "URL", "image_url", "key")

FIRST, ALL, RANDOM, WHOLE = "first", "all", "random", "whole"
CAPTION_LINES = (FIRST, ALL, RANDOM, WHOLE)
NOT_TEXT, UNKNOWN = -1, -2
"""In place of the number of captions of an image: the caption is not text, or could not be read."""
MOST_NAMED = 20
"""A message names at most so many captions."""


def find_column(names: Sequence[str], wanted: str, candidates: Sequence[str], where: str) -> str:
    """The column of a table that holds images or captions.

    Args:
        wanted: The setting. If it is `candidates[0]`, which is the default, and absent, the first candidate counts.
        where: The file or data set, for messages.

    Raises:
        ValueError: If there is none.
    """
    found = [name for name in candidates if name in names] if wanted == candidates[0] else []
    if wanted in names:
        others = ", ".join(name for name in found[1:] if name in CAPTION_COLUMNS[:2])
        if others and candidates is CAPTION_COLUMNS:
            logger.warning_once(f"{where}: captions are those of the column {wanted!r}, not of {others!r}")
        return wanted
    if found:
        logger.warning_once(f"{where}: there is no column {wanted!r}; {found[0]!r} takes its place")
        return found[0]
    urls = [name for name in URL_COLUMNS if name in names]
    hint = ""
    if urls and candidates is IMAGE_COLUMNS:
        hint = f"; {urls[0]!r} holds URLs, not images: download the images first (for example with img2dataset); "
        hint += f"`vlv caption` downloads them by itself with --image-column {urls[0]}"
    option = "--image-column" if candidates is IMAGE_COLUMNS else "--caption-column"
    raise ValueError(f"{where} has the columns {list(names)}, but no {wanted!r}{hint or f'; name one by {option}'}")


def find_prompt_column(
    names: Collection[str], wanted: str | None, caption_column: str | None, where: str
) -> str | None:
    """The column of a table that holds instructions; None if there is none, or captions are not read.

    Args:
        wanted: The setting. If it is `PROMPT_COLUMN`, which is the default, the column may be absent.
        caption_column: The column of captions.

    Raises:
        ValueError: If another column is wanted and absent, or it is that of the captions.
    """
    if not wanted or caption_column is None:
        return None
    if wanted in names and wanted != caption_column:
        say_prompt_column(wanted, where)
        return wanted
    if wanted == PROMPT_COLUMN:
        return None
    if wanted in names:
        raise ValueError(
            f"{where}: prompt_column and caption_column are both {wanted!r}; name another, or leave it out"
        )
    raise missing_prompt_column(wanted, where)


def say_prompt_column(name: str, where: str) -> None:
    logger.warning_once(f"{where}: the column {name!r} is read as instructions (--prompt_column '' reads none)")


def missing_prompt_column(name: str, where: str) -> ValueError:
    return ValueError(f"{where} has no {name!r} for instructions; name a column by --prompt_column, or leave it out")


def require_text(kind: Any, column: str, where: str) -> None:
    """Raises `ValueError` if a column of instructions, of this type of pyarrow, does not hold text."""
    from pyarrow import types

    value = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(value) or types.is_large_string(value) or types.is_null(value)):
        raise ValueError(f"{where}: the column {column!r} holds {kind}, but instructions are text")


def check_prompt(value: Any, where: str) -> str:
    """An instruction; "" for none. Raises `ValueError` if it is not text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{where}: the instruction is {value!r:.80}, expected text")
    return value if value.strip() else ""


def alternatives(value: Any) -> list[str] | None:
    """The captions in a value of a column, those without words left out; None if it is neither text nor a list."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list | tuple | np.ndarray) or not all(isinstance(text, str) for text in values):
        return None
    return [text for text in values if text.strip()]


def sidecar_captions(text: str, caption_lines: str) -> list[str]:
    """The captions in a text file beside an image: its lines, or the text as it is for `"whole"`."""
    if caption_lines == WHOLE:
        return [text.strip()] if text.strip() else []
    return [line.strip() for line in text.splitlines() if line.strip()]


def count_alternatives(value: Any) -> int:
    """The number of captions in a value of a column, or `NOT_TEXT`."""
    found = alternatives(value)
    return NOT_TEXT if found is None else len(found)


def report_bad_captions(names: list[str], counts: np.ndarray, on_bad_caption: str = "skip") -> None:
    """Says which captions are missing (an image without a sidecar), empty or not text.

    Args:
        names: Names of images whose caption is; at least the first `MOST_NAMED`.
        counts: Number of captions of each image, or `NOT_TEXT`.
        on_bad_caption: `"skip"` or `"error"`.

    Raises:
        ValueError: If all are, or there is one and `on_bad_caption` is `"error"`.
    """
    bad, total = int((counts < 1).sum()), len(counts)
    if not bad:
        return
    problem = "missing, empty or not text" if (counts == NOT_TEXT).any() else "missing or empty"
    shown = ", ".join(names[:MOST_NAMED])
    if bad > MOST_NAMED:
        shown += f", and {bad - MOST_NAMED} more (a run lists all in its census.json)"
    if bad == total:
        raise ValueError(f"all {total} captions are {problem} ({shown}); is this the right data?")
    if on_bad_caption == "error":
        raise ValueError(
            f"{bad} of {total} captions are {problem}: {shown}; correct them, or pass --on_bad_caption skip"
        )
    logger.warning(f"{bad} of {total} captions are {problem} and left out: {shown}")


RULES = {
    FIRST: "the first of them counts",
    RANDOM: "one of them is drawn each epoch",
    ALL: "each makes a sample",
    WHOLE: "they are joined by line breaks",
}


def report_several_captions(counts: np.ndarray, caption_lines: str) -> None:
    """Says how many images have several captions, and which of them count."""
    if several := int((counts > 1).sum()):
        logger.warning(
            f"{several} of {len(counts)} images have several captions (at most {counts.max()}): "
            f"{RULES[caption_lines]} (caption_lines: {caption_lines})"
        )
