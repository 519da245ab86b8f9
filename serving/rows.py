"""Captions of one batch, each with settings of its own: what is drawn, where it ends, and its text as it grows.

Shapes in comments: B captions of a batch, V words of the vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.logits_process import TopPLogitsWarper

UNFINISHED_CHARACTER = "\ufffd"  # what a tokenizer decodes the first bytes of a character to


@dataclass(frozen=True)
class Settings:
    """How one caption is written.

    Attributes:
        max_tokens: Most new tokens, EOS included.
        temperature: 0 takes the most probable token; other values divide the logits before one is drawn.
        top_p: Only the most probable tokens of this total probability are drawn from.
        seed: Of the random numbers. Captions of equal seeds are equal, whatever else is in the batch.
        frequency_penalty, presence_penalty: Subtracted from the logit of a token that the caption has already: for
            each time, and once.
        stop: Strings that end the caption before them.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    stop: tuple[str, ...] = ()


@dataclass
class Row:
    """One caption of a batch, while it is written.

    Attributes:
        emit: Called with each part of the text as soon as no later token can change it.
        finish: Called once, with `"stop"` or `"length"`.
        is_cancelled: Whether nobody waits for the caption any more.
        tokens: The new token ids.
        text: The text so far.
        finished: Why it ended, or None.
    """

    settings: Settings
    emit: Callable[[str], None]
    finish: Callable[[str], None]
    is_cancelled: Callable[[], bool]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finished: str | None = None
    emitted: str = ""


class RowSampling(LogitsProcessor):
    """Makes the greedy search of `generate` draw each caption by its own settings.

    A token is drawn by adding Gumbel noise to the logits and taking the largest sum, so that each caption has random
    numbers of its own (Gumbel 1954; Maddison et al. 2014, arXiv 1411.0030).
    """

    def __init__(self, rows: list[Row]):
        self.rows = rows
        self.generators = [torch.Generator().manual_seed(row.settings.seed) for row in rows]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        changed = scores  # (B, V)
        for index, row in enumerate(self.rows):
            own = row.settings
            if not (own.temperature or own.frequency_penalty or own.presence_penalty):
                continue
            if changed is scores:
                changed = scores.clone()
            logits = changed[index : index + 1].float()  # (1, V)
            if row.tokens and (own.frequency_penalty or own.presence_penalty):
                counts = torch.bincount(torch.tensor(row.tokens), minlength=logits.shape[1]).to(logits)
                logits = logits - own.frequency_penalty * counts - own.presence_penalty * (counts > 0)
            if own.temperature:
                logits = logits / own.temperature
                if own.top_p < 1:
                    logits = TopPLogitsWarper(own.top_p)(input_ids, logits)
                uniform = torch.rand(logits.shape, generator=self.generators[index], dtype=torch.float64)
                noise = -(-uniform.clamp(min=1e-300).log()).log()
                logits = logits + noise.to(logits)
            changed[index] = logits[0].to(changed)
        return changed


class RowStopping(StoppingCriteria):
    """Reads each new token, passes text on, and ends captions one by one.

    Args:
        rows: The captions of the batch.
        decode: Token ids to text, without special tokens.
        end_ids: Tokens that end a caption.
    """

    def __init__(self, rows: list[Row], decode: Callable[[list[int]], str], end_ids: set[int]):
        self.rows, self.decode, self.end_ids = rows, decode, end_ids

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            if row.finished is None:
                self._read(row, token)
        finished = [row.finished is not None for row in self.rows]
        return torch.tensor(finished, device=input_ids.device)  # (B,)

    def _read(self, row: Row, token: int) -> None:
        if row.is_cancelled():
            row.finished = "stop"
            return
        row.tokens.append(token)
        ended = token in self.end_ids
        text = self.decode(row.tokens).lstrip()
        found = [position for stop in row.settings.stop if (position := text.find(stop)) >= 0]
        if found:
            text, row.finished = text[: min(found)], "stop"
        elif ended:
            row.finished = "stop"
        elif len(row.tokens) >= row.settings.max_tokens:
            row.finished = "length"
        row.text = text.rstrip() if row.finished else text
        settled = row.text if row.finished else text[: _settled_length(text, row.settings.stop)]
        if len(settled) > len(row.emitted):
            row.emit(settled[len(row.emitted) :])
            row.emitted = settled
        if row.finished:
            row.finish(row.finished)


def _settled_length(text: str, stop: tuple[str, ...]) -> int:
    """How much of a growing text stays as it is: neither white space at its end nor the beginning of a stop string."""
    length = len(text.rstrip(UNFINISHED_CHARACTER))
    for string in stop:
        for size in range(min(len(string) - 1, len(text)), 0, -1):
            if text.endswith(string[:size]):
                length = min(length, len(text) - size)
                break
    return len(text[:length].rstrip())
