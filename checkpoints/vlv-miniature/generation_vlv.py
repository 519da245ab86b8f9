"""Parts of the captioner without weights: what `generate` does around the language model's own, and the backbone.

Shapes in comments: B sequences, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer


def padding_first(embeds: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings `(B, L, d)` and their mask `(B, L)`, with padding moved to the front; the order is kept."""
    order = (mask != 0).long().argsort(dim=1, stable=True)
    return embeds.gather(1, order[..., None].expand_as(embeds)), mask.gather(1, order)


def mask_and_positions(
    sequence: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, past: int
) -> dict[str, torch.Tensor]:
    """What a language model reads beside embeddings `(B, L, d)`, which follow `past` positions."""
    positions = {} if position_ids is None else {"position_ids": position_ids}
    if attention_mask is not None:
        attention_mask = attention_mask.to(sequence.device)
        expected = (len(sequence), past + sequence.shape[1])
        if attention_mask.ndim == 2 and attention_mask.shape != expected:
            raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}, but the sequences are {expected}")
        if attention_mask.ndim == 2 and position_ids is None:
            counted = attention_mask.long().cumsum(-1) - 1
            positions["position_ids"] = counted.clamp(min=0)[:, past:]
        positions["attention_mask"] = attention_mask
    return positions


def count_new_tokens(length: int, explicit: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` in which `max_length` and `min_length`, of `length` and new tokens, are of new ones."""
    counted = dict(arguments)
    for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        value = counted.pop(total, explicit.pop(total, None))
        if value is None or counted.get(new, explicit.get(new)) is not None:
            continue
        if total == "max_length" and value <= length:
            raise ValueError(f"max_length is {value}, but input_ids have {length} tokens already; make it larger")
        counted[new] = max(value - length, 0)
    return counted


def after_prompt(prompt: torch.Tensor, result: Any) -> Any:
    """What `generate` returned, with the prompt `(B, L)` before the new ids."""
    new = result if isinstance(result, torch.Tensor) else result.sequences
    sequences = torch.cat([prompt.to(new).repeat_interleave(len(new) // len(prompt), dim=0), new], dim=1)
    if isinstance(result, torch.Tensor):
        return sequences
    result.sequences = sequences
    return result


def refuse_labels_of_the_prefix(
    labels: torch.Tensor, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None
) -> None:
    """Raises `ValueError` for labels aligned with `input_ids`, as the collators of other models make them."""
    if input_ids is None or labels.shape != input_ids.shape or torch.compiler.is_compiling():
        return
    counted = labels != -100
    repeated = counted & (labels == input_ids)
    if attention_mask is not None and attention_mask.shape == input_ids.shape:
        repeated &= attention_mask != 0
    if counted.any() and torch.equal(repeated, counted):
        raise ValueError(
            "labels repeat input_ids, so the model would learn to write its text prefix twice; labels are the caption "
            "alone, which follows input_ids: pass it to VLVProcessor as suffix=, and leave input_ids out"
        )


def refuse_long_prefix(config: Any, mask: torch.Tensor, new_tokens: int = 1) -> None:
    """Raises `ValueError` if a prefix of this mask `(B, L)` leaves fewer positions than `new_tokens`."""
    positions = getattr(config.text_config.get_text_config(), "max_position_embeddings", None)
    if positions is None or mask.shape[1] + new_tokens <= positions or torch.compiler.is_compiling():
        return
    if (length := int(mask.sum(dim=1).max())) + new_tokens > positions:
        raise ValueError(
            f"the image and the text before the caption have {length} tokens, and the language model has "
            f"{positions} positions, which leaves none for the caption; shorten the text"
            if new_tokens
            else f"input_ids have {length} tokens, but the language model has {positions} positions; shorten them"
        )


def require_one_image_input(images: dict[str, torch.Tensor | None]) -> None:
    """Raises `ValueError` if images are given in no form, or as conditioning and in another form."""
    given = [name for name, value in images.items() if value is not None]
    *names, last = images
    if not given:
        raise ValueError(
            "an image to caption is missing; words and chats need one, too: pass exactly one of "
            f"{', '.join(names)} and {last}"
        )
    if len(given) > 1 and last in given:
        raise ValueError(f"{' and '.join(given)} are given; pass exactly one of {', '.join(names)} and {last}")


def check_text_prefix(text: torch.Tensor, attention_mask: torch.Tensor | None, rows: int, name: str) -> torch.Tensor:
    """The mask `(B, P)` of a text prefix `(B, P)` or `(B, P, d_lm)`; raises `ValueError` if the shapes do not fit.

    Args:
        rows: The number of images.
        name: Of the argument that is the text prefix.
    """
    if len(text) != rows:
        raise ValueError(f"{len(text)} rows of {name} for {rows} images; give one row an image")
    if attention_mask is None:
        return torch.ones(text.shape[:2], dtype=torch.long, device=text.device)
    if attention_mask.shape != text.shape[:2]:
        raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}, but {name} are {tuple(text.shape)}")
    return attention_mask


def require_kept(kept: bool, language_model: Any) -> None:
    """Raises `TypeError` unless a language model gave the logits that it was asked for."""
    if not kept:
        raise TypeError(
            f"{type(language_model).__name__} ignores logits_to_keep, so VLV cannot use it; choose a causal language "
            "model that supports it"
        )


class Backbone:
    """The captioner without the language model's output layer.

    Tools that compute logits themselves, such as TRL's trainers, call it as `model.base_model`. Of a captioner that is
    the encoder, whose attributes it has.
    """

    def __init__(self, captioner: Any):
        object.__setattr__(self, "_captioner", captioner)

    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        caption_embeds: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> Any:
        """The language model's last hidden state `(B, L, d_lm)` of sequences with image tokens."""
        images = {"pixel_values": pixel_values, "caption_embeds": caption_embeds, "image_features": image_features}
        sequence, positions, _ = self._captioner._read_sequence(input_ids, attention_mask, position_ids, None, images)
        decoder = self._captioner.get_decoder()
        return decoder(inputs_embeds=sequence, use_cache=bool(use_cache), return_dict=True, **positions, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._captioner.model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._captioner.model, name, value)


class PromptStreamer(BaseStreamer):
    """Gives a streamer the prompt first, as `generate` of a model that reads no embeddings does."""

    def __init__(self, streamer: Any, prompt: torch.Tensor):
        self.streamer, self.prompt = streamer, prompt

    def put(self, value: torch.Tensor) -> None:
        self.streamer.put(value if self.prompt is None else self.prompt.cpu())
        self.prompt = None  # type: ignore[assignment]

    def end(self) -> None:
        self.streamer.end()


REFUSED_GENERATION_ARGUMENTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "assistant_model": (lambda v: v is not None, "an assistant cannot read the image prefix; leave it out"),
    "prompt_lookup_num_tokens": (lambda v: v is not None, "the prefix is not text to look up in; leave it out"),
    "guidance_scale": (
        lambda v: v not in (None, 1, 1.0),
        "there is no unconditional prefix for the language model; leave it out "
        "(guidance belongs to VLVReconstructionPipeline)",
    ),
    "max_length": (lambda v: v is not None, "the prefix has no words to count; use max_new_tokens"),
    "min_length": (lambda v: v not in (None, 0), "the prefix has no words to count; use min_new_tokens"),
    "prefill_chunk_size": (lambda v: v is not None, "the prefix has no words to cut; leave it out"),
    "inputs_embeds": (lambda v: v is not None, "pass pixel_values or caption_embeds, and words as input_ids"),
}


def check_generation_arguments(arguments: dict[str, Any]) -> None:
    for name, (is_set, advice) in REFUSED_GENERATION_ARGUMENTS.items():
        if name in arguments and is_set(arguments[name]):
            raise ValueError(f"{name} does not work with VLV's generate: {advice}")


__all__ = [
    "Backbone",
    "PromptStreamer",
    "after_prompt",
    "check_generation_arguments",
    "check_text_prefix",
    "count_new_tokens",
    "mask_and_positions",
    "padding_first",
    "refuse_labels_of_the_prefix",
    "refuse_long_prefix",
    "require_kept",
    "require_one_image_input",
]
