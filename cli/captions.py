"""Captions in a JSON file, as `vlv caption` writes them."""

from pathlib import Path
from typing import Any

from vlv.captioning.resume import read_results
from vlv.errors import UserError


def caption_texts(entry: Any) -> list[str]:
    """The captions of an entry: a caption, several in a list, or `{"caption": ...}` of `vlv caption --confidence`.

    Raises:
        ValueError: If the entry is something else, or has no caption.
    """
    given: Any = entry.get("caption") if isinstance(entry, dict) else entry
    texts: list[Any] = given if isinstance(given, list) else [given]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"its entry is {entry!r:.80}; expected a caption, a list of captions, or an object with caption"
        )
    return texts


def read_one_text(path: str | Path, option: str) -> dict[str, str]:
    """`{name: text}` of a file, where several captions of an image are one text, with ` / ` between them.

    Args:
        option: The option that gave the path, for the message.

    Raises:
        UserError: If the file cannot be read, or an entry is no caption.
    """
    texts = {}
    for name, entry in read_results(path, option).items():
        try:
            texts[name] = " / ".join(caption_texts(entry))
        except ValueError as error:
            raise UserError(f"{option}: {path}, {name}: {error}") from error
    return texts
