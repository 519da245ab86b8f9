"""What a model card says, for people who read a model's results."""

import re
from pathlib import Path

from huggingface_hub.repocard import REGEX_YAML_BLOCK

from .layout import CARD_FILE

BOLD_SENTENCE = re.compile(r"\*\*([^*]+[.!])\*\*")


def read_card(folder: Path) -> str:
    """The model card without its front matter, or "" if there is none."""
    if not (folder / CARD_FILE).is_file():
        return ""
    text = (folder / CARD_FILE).read_text(encoding="utf-8", errors="replace")  # a page does without a good card
    return REGEX_YAML_BLOCK.sub("", text, count=1)


def find_limits(card: str) -> str | None:
    """What the model knows and does not know: the sentence in bold in the first paragraph of its card.

    An example is "**It knows birds, and nothing else.**".
    """
    blocks = re.split(r"\n\s*\n", card.strip())
    paragraph = next((block for block in blocks if not block.lstrip().startswith(("#", "<", "!", "[!"))), "")
    found = BOLD_SENTENCE.search(paragraph)
    return " ".join(found.group(1).split()) if found else None


def describe_limits(card: str, results: str) -> str:
    """What the model knows and does not know, for readers of its results, in Markdown.

    Args:
        card: As `read_card` returns it. One without `find_limits` gets a general sentence.
        results: What can be wrong: "Captions" or "Reconstructions".
    """
    if found := find_limits(card):
        return f"**What this model knows.** {found} {results} can be wrong."
    if card:
        return f"**{results} can be wrong.** The model card, below, says what this model was trained on."
    return f"**{results} can be wrong.** This model has no model card that says what it was trained on."
