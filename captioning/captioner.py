"""Writes the captions of batches, with settings that say all that changes a caption."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from vlv import VLVForConditionalGeneration, VLVProcessor
from vlv.pipelines import generate_captions, trim_caption

from .batches import Batch
from .texts import PromptTemplate

AS_ORIGINAL = {"num_beams": 4, "early_stopping": True, "max_new_tokens": 300, "prefix_dtype": torch.bfloat16}


@dataclass(frozen=True)
class CaptionSettings:
    """Everything that changes a caption besides the model and its precision.

    Args:
        max_new_tokens: Most tokens of a caption.
        num_beams: Beams; 1 is greedy.
        trim: Whether an unfinished last sentence and repetitions are removed.
        as_original: Whether `AS_ORIGINAL` and `trim` hold in place of the settings above.
        prompt: Instruction, or beginning of the captions.
        num_captions: Captions of an image; more than one are sampled.
        temperature: Of sampling, above 0. None searches for one caption, and samples several at 1.0.
        seed: Of sampling, 0 or more.
    """

    max_new_tokens: int = 300
    num_beams: int = 1
    trim: bool = False
    as_original: bool = False
    prompt: str | None = None
    num_captions: int = 1
    temperature: float | None = None
    seed: int = 0

    @property
    def is_sampled(self) -> bool:
        return self.num_captions > 1 or self.temperature is not None

    @property
    def generation(self) -> dict[str, Any]:
        """Arguments of `generate_captions`."""
        settings: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams}
        return settings | AS_ORIGINAL if self.as_original else settings

    def recorded(self) -> dict[str, Any]:
        """The settings as plain values for a record of the run, without those that change nothing."""
        recorded: dict[str, Any] = {name: str(value) for name, value in self.generation.items()}
        recorded["trim"] = self.trim or self.as_original
        if self.prompt:
            recorded["prompt"] = self.prompt
        if self.is_sampled:
            temperature = self.temperature or 1.0
            recorded |= {"num_captions": self.num_captions, "temperature": temperature, "seed": self.seed}
        return recorded


@dataclass(frozen=True)
class Captioner:
    """A model with its processor and settings.

    Args:
        template: Writes the prompt of each input, in place of the one of `settings`.
        cut: Shortens captions, those of which one is chosen, too.
        acceleration: Arguments of `generate` that do not change captions: see `accelerate`.
    """

    model: VLVForConditionalGeneration
    processor: VLVProcessor
    settings: CaptionSettings
    template: PromptTemplate | None = None
    cut: Callable[[str], str] | None = None
    acceleration: Mapping[str, Any] = field(default_factory=dict)

    def caption(self, batch: Batch) -> list[list[str]]:
        """The captions of each input of a batch: one, or samples.

        The samples depend on the content of the input and on the seed, and not on the batch.
        """
        groups = self._generate(batch)
        if self.settings.trim or self.settings.as_original:
            groups = [[trim_caption(caption) for caption in own] for own in groups]
        if self.cut is not None:
            groups = [[self.cut(caption) for caption in own] for own in groups]
        return groups

    def _generate(self, batch: Batch) -> list[list[str]]:
        settings = self.settings
        prompts = None if self.template is None else [self.template.render(item) for item in batch.inputs]
        generation: dict[str, Any] = {"text": prompts or settings.prompt, **settings.generation, **self.acceleration}
        if not settings.is_sampled:
            captions = generate_captions(self.model, self.processor, **(batch.tensors | generation))
            return [[caption] for caption in captions]
        generation |= {
            "do_sample": True,
            "temperature": settings.temperature or 1.0,
            "num_return_sequences": settings.num_captions,
        }
        groups = []
        for place, item in enumerate(batch.inputs):
            content = (item.identity or {}).get("blake2b") or item.name  # of a pipe, the name
            digest = hashlib.blake2b(f"{settings.seed}/{content}".encode(), digest_size=8).digest()
            tensors: dict[str, Any] = {name: rows[place : place + 1] for name, rows in batch.tensors.items()}
            torch.manual_seed(int.from_bytes(digest))
            if prompts is not None:
                generation["text"] = prompts[place]
            groups.append(generate_captions(self.model, self.processor, **tensors, **generation))
        return groups
