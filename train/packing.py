"""Packing: the language model of stage 2 reads the captions of a batch one after the other, without padding.

Every caption follows its own prefix, at its own positions, and attends to nothing else. What the language model
computes is what it computes of the padded rows: the same predictions in the same order.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED_SDPA = "sdpa_of_packed_rows"
"""The attention implementation that `pack_captions` gives a language model in the place of `sdpa`."""
TOLERANCE, HALF_TOLERANCE = 0.005, 0.05
"""The largest difference of logits, as a share of the largest logit: in float32, and in half precision.

A wrong mask makes more, unless what it hides hardly counts.
"""
_CAUSAL = WeakTensorKeyDictionary()
"""Of a mask, which is made once in a pass and read by many layers: for each of the sequences whether it is causal."""


def packed_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packed_lengths: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`sdpa` of each of the sequences in a row by itself; of a row that is not packed, `sdpa`.

    The time grows with the sum of the squares of the lengths, and not with the square of their sum. The memory of
    the mask does: transformers builds it for the whole row, one byte for each pair of positions.

    Args:
        query, key, value: `(1, heads, T, d)`, where `T = sum(packed_lengths)`.
        attention_mask: `(1, 1, T, T)`, of the row. It keeps the sequences apart by itself, where a model does not
            pass `packed_lengths` on.
        packed_lengths: Of the sequences.
    """
    if packed_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    causal = _are_causal(attention_mask, packed_lengths)
    outputs, end = [], 0
    for length, is_causal in zip(packed_lengths, causal, strict=True):
        own = slice(end, end := end + length)
        mask = None if attention_mask is None or is_causal else attention_mask[..., own, own]
        parts = (query[:, :, own], key[:, :, own], value[:, :, own])
        outputs.append(sdpa_attention_forward(module, *parts, mask, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)


def _are_causal(mask: torch.Tensor | None, lengths: Sequence[int]) -> Sequence[bool]:
    """For each sequence, whether the mask lets a position see all of the sequence before it (no window, no chunk).

    Attention is faster without such a mask.
    """
    if mask is None or mask.dtype != torch.bool:
        return [mask is None] * len(lengths)
    if mask not in _CAUSAL:
        lower = torch.ones(max(lengths), max(lengths), dtype=torch.bool, device=mask.device).tril()
        equal, end = [], 0
        for length in lengths:
            own = slice(end, end := end + length)
            equal.append((mask[..., own, own] == lower[:length, :length]).all())
        _CAUSAL[mask] = torch.stack(equal).tolist()
    return _CAUSAL[mask]


def pack_captions(language_model: Any) -> None:
    """Makes a language model pack its rows wherever it is asked for logits by a boolean mask, as in training.

    Padding, and what follows the last position whose logits are wanted, is left out. Logits are those of the padded
    rows, `(number of labels, vocab)`. A language model that packs already is left as it is.

    Raises:
        ValueError: If the language model does not keep packed captions apart, or cannot read them. It then reads
            padded rows, as before.
    """
    if is_packing(language_model):
        return
    base, equal = base_of(language_model), False
    failure = f"packing does not work with {type(base).__name__}"
    try:
        padded = _sample_logits(language_model)
        if base.config._attn_implementation == "sdpa":
            base.set_attn_implementation(PACKED_SDPA)
        language_model.register_forward_pre_hook(_pack, with_kwargs=True)
        packed = _sample_logits(language_model)
        allowed = (TOLERANCE if base.dtype == torch.float32 else HALF_TOLERANCE) * padded.abs().max()
        equal = packed.shape == padded.shape and bool((packed - padded).abs().max() <= allowed)
    except Exception as error:  # of the code of any language model
        reason = " ".join(str(error).split())
        raise ValueError(f"{failure}: {type(error).__name__}: {reason:.200}") from error
    finally:
        if not equal:
            unpack_captions(language_model)
    if not equal:
        raise ValueError(f"{failure}: it does not keep captions in one row apart")


def unpack_captions(language_model: Any) -> None:
    """Undoes `pack_captions`, if it was called."""
    for key, hook in list(language_model._forward_pre_hooks.items()):
        if hook is _pack:
            del language_model._forward_pre_hooks[key]
            language_model._forward_pre_hooks_with_kwargs.pop(key, None)
    base = base_of(language_model)
    if base.config._attn_implementation == PACKED_SDPA:
        base.set_attn_implementation("sdpa")


def is_packing(language_model: Any) -> bool:
    """Whether `pack_captions` was called on a language model."""
    return any(hook is _pack for hook in language_model._forward_pre_hooks.values())


def can_pack_fast(language_model: Any) -> bool:
    """Whether the attention of a language model takes each sequence of a packed row by itself."""
    own = str(base_of(language_model).config._attn_implementation)
    return own in ("sdpa", PACKED_SDPA) or "flash" in own


def base_of(language_model: Any) -> Any:
    """The language model itself, without the LoRA layers' wrapper."""
    return language_model.get_base_model() if hasattr(language_model, "peft_config") else language_model


def _pack(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """The arguments of a packed call in the place of those of a padded one."""
    kept = kwargs.get("logits_to_keep")  # (B, T)
    if not isinstance(kept, torch.Tensor) or kept.ndim != 2 or kept.dtype != torch.bool:
        return None
    needed = kept.flip(1).cumsum(1).flip(1) > 0  # up to the last position that is kept
    if kwargs.get("attention_mask") is not None:
        needed &= kwargs["attention_mask"].bool()
    lengths = [length for length in needed.sum(1).tolist() if length]
    if not lengths:
        return None
    places = needed.flatten().nonzero()[:, 0]
    embeds = kwargs["inputs_embeds"]  # (B, T, d_lm)
    packed = {
        "inputs_embeds": embeds.flatten(0, 1).index_select(0, places)[None],  # (1, sum of the lengths, d_lm)
        "attention_mask": None,  # the library finds the sequences in a row by their positions
        "position_ids": (needed.cumsum(1) - 1).flatten()[places][None],
        "logits_to_keep": kept.flatten()[places][None],
    }
    if base_of(module).config._attn_implementation == PACKED_SDPA:
        packed["packed_lengths"] = lengths
    return args, {**kwargs, **packed}


@torch.no_grad()
def _sample_logits(language_model: Any) -> torch.Tensor:
    """The logits `(6, vocab)` of two rows of a few words, one of them padded."""
    embedding = language_model.get_input_embeddings()
    ids = torch.arange(8, device=embedding.weight.device).view(2, 4) % embedding.weight.shape[0]
    kept = torch.tensor([[True, True, True, False], [False, True, True, True]], device=ids.device)
    was_training = language_model.training
    language_model.eval()
    try:
        call = {"inputs_embeds": embedding(ids), "logits_to_keep": kept, "use_cache": False, "return_dict": True}
        return language_model(**call).logits.float()
    finally:
        language_model.train(was_training)
