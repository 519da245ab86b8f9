"""Parts of the captioner without weights: what `generate` does around the language model's own, and the backbone.

Shapes in comments: B sequences, L tokens, R rows of a sequence: its beams, or its samples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What transformers calls keys and values, as an argument and in an output: `cache` from 5.24 on."""


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


def merge_settings(
    own: GenerationConfig, given: GenerationConfig | None, arguments: dict[str, Any]
) -> tuple[GenerationConfig, dict[str, Any]]:
    """The settings of a call of `generate`, and the arguments that are no settings: a streamer, stopping criteria, ...

    Args:
        own: The model's. Its lengths do not count: those of a language model count its prompt, and a VLV's prefix is
            not part of that prompt.
        given: The call's, which overrides them.
        arguments: Of the call, which override both.
    """
    settings = copy.deepcopy(given or own)
    settings.max_length = settings.min_length = None
    defaults = {name: value for name, value in own.to_dict().items() if name not in ("max_length", "min_length")}
    settings.update(**{name: value for name, value in defaults.items() if value is not None}, defaults_only=True)
    return settings, settings.update(**arguments)


def after_prompt(prompt: torch.Tensor, result: Any) -> Any:
    """What `generate` returned, with the prompt `(B, L)` before the new ids."""
    new = result if isinstance(result, torch.Tensor) else result.sequences
    sequences = torch.cat([prompt.to(new).repeat_interleave(len(new) // len(prompt), dim=0), new], dim=1)
    if isinstance(result, torch.Tensor):
        return sequences
    result.sequences = sequences
    return result


class InPlaceLayer(DynamicLayer):
    """Keys and values `(B, heads, L, d)` in buffers with room for further positions, which are written in place.

    `DynamicLayer` copies all positions at each new one, and again when beams change places.

    Attributes:
        shared: Number of first positions that are equal in the rows among which beams change places.
    """

    ROOM = 64  # positions
    keys: Any
    values: Any

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.shared = 0
        self._buffers: list[torch.Tensor] = []  # of keys and values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds keys and values, and returns all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        self.shared = min(self.shared, start)
        if not self._is_in_buffers() or end > self._buffers[0].shape[-2]:
            former = (self.keys, self.values)
            self._buffers = [_with_room(states, end + self.ROOM) for states in (key_states, value_states)]
            if start:
                for buffer, states in zip(self._buffers, former, strict=True):
                    buffer[..., :start, :] = states
        keys, values = (buffer[..., :end, :] for buffer in self._buffers)
        keys[..., start:, :], values[..., start:, :] = key_states, value_states
        self.keys, self.values = keys, values
        return keys, values

    def _is_in_buffers(self) -> bool:
        """Whether keys and values are the first positions of the buffers."""
        if not self._buffers or not self.get_seq_length():
            return False
        pairs: Any = zip((self.keys, self.values), self._buffers, strict=True)
        return all(len(states) == len(buffer) and states.data_ptr() == buffer.data_ptr() for states, buffer in pairs)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Gives row `i` what row `beam_idx[i]` has. The shared positions stay where they are."""
        if not self.shared or not self._is_in_buffers():
            return super().reorder_cache(beam_idx)
        for buffer in self._buffers:
            own = buffer[..., self.shared : self.get_seq_length(), :]
            own.copy_(own.index_select(0, beam_idx.to(own.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.shared = 0
        super().batch_select_indices(indices)


def _with_room(states: torch.Tensor, length: int) -> torch.Tensor:
    """A buffer of `length` positions for states `(B, heads, L, d)`."""
    return states.new_empty((*states.shape[:-2], length, states.shape[-1]))


class CaptionCache(DynamicCache):
    """Keys and values of a language model that writes captions: in place, and of a prefix that rows share.

    Args:
        config: Of the language model.
    """

    layers: list[Any]

    def __init__(self, config: Any):
        super().__init__(config=config)
        self.has_other_layers = any(type(x) not in (DynamicLayer, DynamicSlidingWindowLayer) for x in self.layers)
        self.layers = [InPlaceLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]
        self.rows = 1

    def _in_place_layers(self) -> list[InPlaceLayer]:
        return [layer for layer in self.layers if isinstance(layer, InPlaceLayer)]

    def share(self, rows: int) -> None:
        """Repeats each row, so that all positions are shared by `rows` neighbours."""
        self.batch_repeat_interleave(rows)
        self.rows = rows
        for layer in self._in_place_layers():
            layer.shared = layer.get_seq_length()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Gives row `i` what row `beam_idx[i]` has."""
        own = torch.arange(len(beam_idx), device=beam_idx.device) // self.rows
        if not torch.equal(beam_idx // self.rows, own):  # not only among the rows of one prefix
            for layer in self._in_place_layers():
                layer.shared = 0
        super().reorder_cache(beam_idx)


def caption_cache(
    language_model: Any,
    prefix: torch.Tensor,
    mask: torch.Tensor,
    settings: GenerationConfig,
    arguments: dict[str, Any],
) -> dict[str, CaptionCache]:
    """The argument `CACHE` of the language model's `generate`, which reads each prefix once.

    Beams and samples share their prefix: it is read once a sequence, but for the last position, whose logits
    `generate` needs for each row. Without beams and several samples the cache is empty.

    Args:
        prefix: `(B, L, d_lm)`.
        mask: `(B, L)`, with padding in front.
        settings: Of `generate`.
        arguments: Of `generate`, besides these settings.

    Returns:
        Nothing for language models with states besides keys and values, for settings that choose another cache, and
        where the states of every position are asked for.
    """
    own_settings = language_model.generation_config

    def setting(name: str) -> Any:
        value = getattr(settings, name, None)
        return getattr(own_settings, name, None) if value is None else value

    others = {"past_key_values", "cache", "custom_generate"} & arguments.keys()
    if others or setting("cache_implementation") or getattr(language_model, "_is_stateful", False):
        return {}
    cache = CaptionCache(language_model.config)
    if cache.has_other_layers:
        return {}
    rows = max(setting("num_beams") or 1, setting("num_return_sequences") or 1)
    if rows > 1 and prefix.shape[1] > 1:
        if setting("output_hidden_states") or setting("output_attentions"):
            return {}
        first, first_mask = prefix[:, :-1], mask[:, :-1]
        positions = {} if mask.all() else mask_and_positions(first, first_mask, None, 0)
        language_model(inputs_embeds=first, use_cache=True, logits_to_keep=1, **positions, **{CACHE: cache})
        cache.share(rows)
    return {CACHE: cache}


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
    "CaptionCache",
    "PromptStreamer",
    "after_prompt",
    "caption_cache",
    "check_generation_arguments",
    "check_text_prefix",
    "count_new_tokens",
    "mask_and_positions",
    "merge_settings",
    "padding_first",
    "refuse_labels_of_the_prefix",
    "refuse_long_prefix",
    "require_kept",
    "require_one_image_input",
]
