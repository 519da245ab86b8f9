"""The instructions in the training data, which a model records so that programs can offer them."""

from collections import Counter
from collections.abc import Iterable

from vlv import VLVConfig

from .checkpoints import say

MOST_RECORDED = 20
"""A model trained with more different instructions than these records none: they are free words."""


def count_instructions(prompts: Iterable[str]) -> Counter[str]:
    """How often each instruction occurs; rows without one are left out."""
    return Counter(prompt for prompt in prompts if prompt)


def record_instructions(config: VLVConfig, counts: Counter[str]) -> None:
    """Adds instructions to those that a model was trained with, the most frequent first.

    Says so where there are more than `MOST_RECORDED`, and adds none.
    """
    if not counts:
        return
    frequent = sorted(counts, key=lambda text: (-counts[text], text))
    together = list(dict.fromkeys([*(config.instructions or []), *frequent]))
    if len(together) > MOST_RECORDED:
        say(f"{len(counts)} different instructions: the model records at most {MOST_RECORDED}, and so none of these")
        return
    config.instructions = together
