"""Group-relative policy gradient (Shao et al., 2024): advantages of captions within their image, and the loss."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from vlv import VLVForConditionalGeneration

from .data import Stage2Collator

if TYPE_CHECKING:
    from .rounds import RoundFile

SMALLEST_DEVIATION = 1e-5
"""Rewards of a group whose standard deviation is smaller are equal: they are rounded to 6 digits."""
LARGEST_DIFFERENCE, LARGEST_KL = 20.0, 10.0
"""Of the log-probabilities of a token and of its estimated divergence, so that no loss is infinite."""


def group_advantages(rewards: Sequence[float | None]) -> list[float | None]:
    """How much better than its group each caption is, in standard deviations.

    Args:
        rewards: Of the captions of one image; None for a caption without one.

    Returns:
        None for captions without a reward; for all of them if the rewards are equal, or there is one alone.
    """
    found = [reward for reward in rewards if reward is not None]
    if not found:
        return [None] * len(rewards)
    mean = sum(found) / len(found)
    deviation = math.sqrt(sum((reward - mean) ** 2 for reward in found) / len(found))
    if deviation < SMALLEST_DEVIATION:
        return [None] * len(rewards)
    return [None if reward is None else (reward - mean) / deviation for reward in rewards]


def token_log_probabilities(logits: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities `(B, L)` of labels `(B, L)` at logits `(B, L, vocab)`; 0 where a label is -100."""
    return -F.cross_entropy((logits.float() / temperature).transpose(1, 2), labels, reduction="none")


def without_padding(labels: torch.Tensor) -> torch.Tensor:
    """Labels `(B, L)` up to the end of the longest row; -100 is padding, on the right."""
    return labels[:, : int((labels != -100).sum(dim=1).max())]


@dataclass
class PolicyLoss:
    """The loss of a batch, and what it consists of. Each is a sum over tokens.

    Attributes:
        loss: With a gradient.
        kl: Of the model from the start, an estimate that is never negative and `LARGEST_KL` a token at most.
        clipped: Tokens whose ratio is out of range on the side that the loss cuts off.
        tokens: Their number.
    """

    loss: torch.Tensor
    kl: torch.Tensor
    clipped: torch.Tensor
    tokens: torch.Tensor


def policy_loss(
    log_probs: torch.Tensor,
    sampled_log_probs: torch.Tensor,
    start_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip_range: float,
    kl_weight: float,
) -> PolicyLoss:
    """The clipped loss of PPO with a penalty on the divergence from the start.

    Args:
        log_probs: `(B, L)`, of the tokens by the model.
        sampled_log_probs, start_log_probs: `(B, L)`, by the model that sampled them and by the start of the run.
        advantages: `(B,)`.
        mask: `(B, L)`, bool: tokens that count.
    """
    ratio = (log_probs - sampled_log_probs).exp()
    gain = advantages[:, None]
    bounded = ratio.clamp(1 - clip_range, 1 + clip_range)
    difference = (start_log_probs - log_probs).clamp(-LARGEST_DIFFERENCE, LARGEST_DIFFERENCE)
    kl = (difference.exp() - difference - 1).clamp(max=LARGEST_KL)  # the estimator k3 of Schulman (2020)
    losses = kl_weight * kl - torch.minimum(ratio * gain, bounded * gain)
    clipped = (bounded * gain < ratio * gain) & mask
    return PolicyLoss(losses[mask].sum(), kl.detach()[mask].sum(), clipped.sum(), mask.sum())


@torch.no_grad()
def measure_log_probabilities(
    model: VLVForConditionalGeneration,
    conditioning: torch.Tensor,
    places: Sequence[int],
    labels: torch.Tensor,
    temperature: float,
    batch_size: int,
) -> list[list[float]]:
    """Log-probabilities of the tokens of captions.

    Args:
        conditioning: `(N, Q, d_cond)`, of images.
        places: Of each of `B` captions, the row of its image.
        labels: `(B, L)`, padded with -100.

    Returns:
        Of each caption as many as it has tokens, rounded to 6 digits.
    """
    found: list[list[float]] = []
    for start in range(0, len(labels), batch_size):
        own = without_padding(labels[start : start + batch_size]).to(conditioning.device)
        rows = torch.tensor(places[start : start + batch_size], device=conditioning.device)
        logits = model(conditioning=conditioning[rows], labels=own, return_logits=True).logits
        values = token_log_probabilities(logits, own, temperature).double().cpu().round(decimals=6)
        found += [row[label != -100].tolist() for row, label in zip(values, own.cpu(), strict=True)]
    return found


class PolicySamples:
    """Reads the sampled captions of a round from its file, with their advantages and log-probabilities.

    Args:
        file: Of a finished round.
    """

    def __init__(self, file: "RoundFile"):
        self.file = file

    def groups(self) -> list[list[tuple[int, tuple[int, int, int]]]]:
        """For each image its index and the key of each sample that has an advantage: part, place in it, and sample."""
        found = []
        for part in range(self.file.num_parts):
            for place, image in enumerate(self.file.read_part(part)):
                gains = group_advantages(image.sample_rewards)
                own = [(image.index, (part, place, n)) for n, gain in enumerate(gains) if gain is not None]
                if own:
                    found.append(own)
        return found

    def __call__(self, key: tuple[int, int, int]) -> dict[str, Any]:
        """What a training item has besides its image."""
        part, place, number = key
        image = self.file.read_image(part, place)
        return {
            "caption": image.captions[1 + number],
            "advantage": group_advantages(image.sample_rewards)[number],
            "sampled_log_probs": image.sampled_log_probs[number],
            "start_log_probs": image.start_log_probs[number],
        }


class PolicyCollator(Stage2Collator):
    """Batches of sampled captions: as `Stage2Collator`, with `advantages` `(B,)` and two tensors `(B, L)`.

    Those are `sampled_log_probs` and `start_log_probs`, 0 where a caption is padded.
    """

    def load_readable(self, items: list[dict], image_processor: Any) -> tuple[list[dict], list[Any], list[str]]:
        found = super().load_readable(items, image_processor)
        self._items = found[0]
        return found

    def __call__(self, items: list[dict]) -> dict[str, Any]:
        batch = super().__call__(items)
        if "advantage" not in self._items[0]:  # of an evaluation
            return batch
        batch["advantages"] = torch.tensor([item["advantage"] for item in self._items])
        length = batch["labels"].shape[1]
        for name in ("sampled_log_probs", "start_log_probs"):
            rows = torch.zeros(len(self._items), length)
            for row, item in zip(rows, self._items, strict=True):
                row[: len(item[name])] = torch.tensor(item[name])
            batch[name] = rows
        return batch
