"""How likely captions are as text alone: what stage 3 tells a language from words that please the denoiser by."""

from collections.abc import Sequence
from typing import Any

import torch

from vlv import VLVForConditionalGeneration, VLVProcessor

from .policy_gradient import token_log_probabilities, without_padding


@torch.no_grad()
def measure_fluency(
    model: VLVForConditionalGeneration,
    processor: VLVProcessor,
    captions: Sequence[str],
    max_tokens: int,
    append_eos: bool,
    batch_size: int,
) -> list[float]:
    """The mean log-probability of the tokens of captions by the language model without an image.

    The first token has nothing before it, and does not count.

    Args:
        max_tokens: Longer captions are cut.
        append_eos: Whether EOS counts.
        batch_size: Captions at once.

    Returns:
        Of each caption a number up to 0, which is 0 for a caption of one token.
    """
    labels = processor(suffix=list(captions), max_length=max_tokens, append_eos=append_eos).labels
    language_model: Any = model.language_model
    found: list[float] = []
    for own in labels.split(batch_size):
        ids = without_padding(own).to(model.device)
        logits = language_model(ids.clamp(min=0), attention_mask=(ids != -100).long(), use_cache=False).logits
        values = token_log_probabilities(logits[:, :-1], ids[:, 1:], temperature=1.0)  # (B, L - 1)
        counts = (ids[:, 1:] != -100).sum(dim=1).clamp(min=1)
        found += (values.double().sum(dim=1) / counts).tolist()
    return found
