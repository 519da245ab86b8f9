"""Captions of a part of a round: the present model samples them, the frozen text-to-image model gives rewards."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import GenerationConfig
from transformers.utils import logging

from vlv import VLVForConditionalGeneration, VLVProcessor
from vlv.pipelines import DiffusionScorer
from vlv.pipelines.diffusion_score import seed_of_pixels

from .data.collators import diffusion_pixels, load_item, look_up, name_of
from .data.feature_cache import FeatureCache
from .data.mixture import drawn
from .evaluating import kept_random_state
from .fluency import measure_fluency
from .policy_gradient import measure_log_probabilities
from .reward_cache import RewardCache
from .rounds import BufferEntry, ScoredCaptions

logger = logging.get_logger(__name__)

SAMPLING = 23  # what random numbers are for


@dataclass
class ImagePart:
    """The readable images of a part of a round.

    Attributes:
        indices, names: Of the images, in the data set.
        pixel_values: `(N, 3, height, width)`, for the encoder; None where there is `conditioning`.
        conditioning: `(N, Q, d_cond)`, of the cache; None without one.
        diffusion_pixels: `(N, 3, S, S)`, uint8, for the text-to-image model; None without readable images.
        unreadable: Messages about the others.
    """

    indices: list[int]
    names: list[str]
    pixel_values: torch.Tensor | None
    conditioning: torch.Tensor | None
    diffusion_pixels: torch.Tensor | None
    unreadable: list[str]


class ImageParts(Dataset):
    """Reads the images of parts. Items are `(number of the part, ImagePart)`.

    Args:
        images: Items with `image`.
        parts: The indices of the images of each part, by its number.
        image_size: Side of `diffusion_pixels`.
        conditioning: The cache of `cache_conditioning`.
    """

    def __init__(
        self,
        images: Any,
        parts: Mapping[int, Sequence[int]],
        image_processor: Any,
        image_size: int,
        conditioning: FeatureCache | None = None,
    ):
        self.images, self.parts, self.numbers = images, parts, list(parts)
        self.image_processor, self.image_size, self.conditioning = image_processor, image_size, conditioning

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> tuple[int, ImagePart]:
        number = self.numbers[place]
        indices, items, loaded, unreadable = [], [], [], []
        for index in self.parts[number]:
            item = self.images[index]
            try:
                loaded.append(load_item(item, self.image_processor))
            except ValueError as error:
                name = name_of(item["image"])
                unreadable.append(str(error) if name in str(error) else f"{name}: {error}")
                continue
            indices.append(index)
            items.append(item)
        if not loaded:
            return number, ImagePart([], [], None, None, None, unreadable)
        pixel_values = conditioning = None
        if self.conditioning is None:
            pixel_values = self.image_processor(loaded, return_tensors="pt", pre_crop_size=None).pixel_values
        else:
            conditioning = look_up(self.conditioning, loaded, items)
        names, pixels = [name_of(item["image"]) for item in items], diffusion_pixels(loaded, self.image_size)
        return number, ImagePart(indices, names, pixel_values, conditioning, pixels, unreadable)


@contextlib.contextmanager
def plain_generation(model: VLVForConditionalGeneration, eos_token_id: int) -> Iterator[list[int]]:
    """A context in which `generate` draws from the model's distribution as it is, whatever settings the model has.

    Kept are its special tokens and the tokens that it must not write.

    Args:
        eos_token_id: Of the tokenizer.

    Returns:
        All tokens that end a caption.
    """
    parts: list[Any] = [model, model.language_model]
    kept = [part.generation_config for part in parts]
    own = model.generation_config.eos_token_id
    ends = sorted({eos_token_id, *(own if isinstance(own, list) else [] if own is None else [own])})
    names = ("pad_token_id", "bos_token_id", "decoder_start_token_id", "suppress_tokens")
    plain = GenerationConfig(eos_token_id=ends, **{name: getattr(kept[0], name) for name in names})
    try:
        for part in parts:
            part.generation_config = plain
        yield ends
    finally:
        for part, settings in zip(parts, kept, strict=True):
            part.generation_config = settings


def read_parts(parts: ImageParts, num_workers: int) -> DataLoader:
    """The parts in their order, each read ahead of its use by one of at most two processes: a part is large."""
    num_workers = min(num_workers, 2)
    return DataLoader(parts, batch_size=None, num_workers=num_workers, prefetch_factor=1 if num_workers else None)


def read_images(model: VLVForConditionalGeneration, images: ImagePart) -> torch.Tensor:
    """What the language projection reads of images, `(N, Q, d_cond)`."""
    if images.conditioning is not None:
        return images.conditioning.to(model.device)
    assert images.pixel_values is not None
    return model.model(images.pixel_values.to(model.device, model.dtype)).conditioning


class Proposer:
    """Samples and scores captions.

    Args:
        args: The configuration of stage 3.
        processor: Of the captioner.
        scorer: Of the frozen text-to-image model.
        cache: Of the scorer's losses.
        at_start: A context in which the model has the weights of the start of the run, for `grpo` and
            `fluency_floor`.
    """

    def __init__(
        self,
        args: Any,
        processor: VLVProcessor,
        scorer: DiffusionScorer,
        cache: RewardCache,
        at_start: Callable[[VLVForConditionalGeneration], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        self.args, self.processor, self.scorer, self.cache, self.at_start = args, processor, scorer, cache, at_start

    def propose(
        self,
        model: VLVForConditionalGeneration,
        images: ImagePart,
        buffer: Mapping[int, BufferEntry],
        seed: Sequence[int],
    ) -> list[ScoredCaptions]:
        """Captions of the images of a part: the greedy one, samples, and the best so far, with their rewards.

        Args:
            model: In evaluation mode.
            seed: The samples depend on it, on the model and on the images of the part alone.
        """
        if images.diffusion_pixels is None:
            return []
        with kept_random_state(), torch.no_grad():
            torch.manual_seed(int(drawn(*seed, SAMPLING).integers(2**63)))
            conditioning = read_images(model, images)
            greedy, greedy_ends = self.generate(model, conditioning)
            sampled, ends = self.generate(
                model,
                conditioning,
                do_sample=True,
                temperature=self.args.temperature,
                top_p=self.args.top_p,
                num_return_sequences=self.args.num_captions,
            )
        count = self.args.num_captions
        found = []
        for number, (index, name) in enumerate(zip(images.indices, images.names, strict=True)):
            own = slice(number * count, (number + 1) * count)
            captions, finished = [greedy[number], *sampled[own]], [greedy_ends[number], *ends[own]]
            empty = [whole and not text for whole, text in zip(finished, captions, strict=True)]
            scored = zip(finished, empty, strict=True)
            rewards: list[float | None] = [0.0 if whole and not blank else None for whole, blank in scored]
            if (earlier := buffer.get(index)) is not None:
                captions.append(earlier.caption)
                rewards.append(0.0)
            unfinished = len(finished) - sum(finished)
            found.append(ScoredCaptions(index, name, captions, rewards, count, unfinished, sum(empty)))
        if self.args.fluency_floor is not None:
            self.drop_gibberish(model, found)
        self.reward(images.diffusion_pixels, found)
        if self.args.method == "grpo":
            self.measure_log_probabilities(model, images, conditioning, found)
        return found

    def generate(
        self, model: VLVForConditionalGeneration, conditioning: torch.Tensor, **settings: Any
    ) -> tuple[list[str], list[bool]]:
        """Captions of images `(N, Q, d_cond)`, and whether each ended before `max_caption_tokens`.

        The model's own generation settings (penalties, cut-offs of the distribution) do not count. A model that is
        trained without EOS ends nowhere; all its captions count as ended.
        """
        with plain_generation(model, self.processor.tokenizer.eos_token_id) as eos_token_ids:
            ids = model.generate(
                conditioning=conditioning,
                max_new_tokens=self.args.max_caption_tokens,
                **{"do_sample": False, "num_beams": 1, **({"top_k": 0} if settings else {}), **settings},
            )
        captions = [text.strip() for text in self.processor.batch_decode(ids, skip_special_tokens=True)]
        ended = torch.isin(ids, torch.tensor(eos_token_ids, device=ids.device)).any(dim=1).tolist()
        return captions, ended if self.args.append_eos else [True] * len(captions)

    def drop_gibberish(self, model: VLVForConditionalGeneration, found: Sequence[ScoredCaptions]) -> None:
        """Takes the rewards of captions that the language model of the start finds less likely than `fluency_floor`.

        Sets their fluency, of captions that have none None.
        """
        texts = {c for image in found for c, r in zip(image.captions, image.rewards, strict=True) if r is not None}
        words = sorted(texts, key=lambda text: (len(text), text))  # captions of one length are padded least
        if not words:
            return
        args = self.args
        with self.at_start(model):
            values = measure_fluency(
                *(model, self.processor, words, args.max_caption_tokens, args.append_eos),
                batch_size=args.per_device_train_batch_size,
            )
        fluency = dict(zip(words, values, strict=True))
        for image in found:
            scored = zip(image.captions, image.rewards, strict=True)
            image.fluency = [None if reward is None else round(fluency[caption], 4) for caption, reward in scored]
            pairs = zip(image.rewards, image.fluency, strict=True)
            image.rewards = [None if own is not None and own < args.fluency_floor else r for r, own in pairs]
            image.not_fluent = sum(own is not None and own < args.fluency_floor for own in image.fluency)

    def reward(self, pixels: torch.Tensor, found: Sequence[ScoredCaptions]) -> None:
        """Sets the rewards that are not None, and counts what could not be scored as it is.

        A reward is the score less `length_penalty` for each word.
        """
        seeds = [seed_of_pixels(image) for image in pixels]
        known = [self.cache.read(seed) for seed in seeds]
        before = [set(losses) for losses in known]
        groups = []
        for image in found:
            scored = zip(image.captions, image.rewards, strict=True)
            groups.append([caption for caption, reward in scored if reward is not None])
        places = [place for place, group in enumerate(groups) if group]
        if not places:
            return
        most = max(map(len, groups))
        scores = self.scorer.score_latents(
            self.scorer.encode_images(pixels[places], [seeds[place] for place in places]),
            [groups[place] + groups[place][:1] * (most - len(groups[place])) for place in places],
            [seeds[place] for place in places],
            allow_nan=True,
            known=[known[place] for place in places],
        )
        for row, place in enumerate(places):
            image, count = found[place], len(groups[place])
            finite = scores.scores[row].isfinite().tolist()
            values = iter(zip(scores.scores[row].tolist(), finite, strict=True))
            for number, (caption, reward) in enumerate(zip(image.captions, image.rewards, strict=True)):
                if reward is not None:
                    value, is_finite = next(values)
                    value -= self.args.length_penalty * len(caption.split())
                    image.rewards[number] = round(value, 6) if is_finite else None
            image.not_finite = count - sum(finite[:count])
            image.split = int((scores.num_texts[row, :count] > 1).sum())
            image.cut = int(scores.num_cut[row, :count].sum())
        self.cache.add(
            {
                seed: {text: loss for text, loss in losses.items() if text not in old}
                for seed, losses, old in zip(seeds, known, before, strict=True)
            }
        )

    def measure_log_probabilities(
        self,
        model: VLVForConditionalGeneration,
        images: ImagePart,
        conditioning: torch.Tensor,
        found: Sequence[ScoredCaptions],
    ) -> None:
        """Adds the log-probabilities of the samples that have a reward, by the model and by the start of the run."""
        chosen = [
            (place, number)
            for place, image in enumerate(found)
            for number, reward in enumerate(image.sample_rewards)
            if reward is not None
        ]
        if not chosen:
            return
        labels = self.processor(
            suffix=[found[place].captions[1 + number] for place, number in chosen],
            max_length=self.args.max_caption_tokens,
            append_eos=self.args.append_eos,
        ).labels
        arguments = (
            [place for place, _ in chosen],
            labels,
            self.args.temperature,
            self.args.per_device_train_batch_size,
        )
        by_model = measure_log_probabilities(model, conditioning, *arguments)
        by_start = by_model  # without an effect where the divergence has no weight
        if self.args.kl_weight:
            with self.at_start(model), torch.no_grad():
                if any(parameter.requires_grad for parameter in model.model.parameters()):
                    conditioning = read_images(model, images)
                by_start = measure_log_probabilities(model, conditioning, *arguments)
        for image in found:
            image.sampled_log_probs = [[] for _ in range(image.num_samples)]
            image.start_log_probs = [[] for _ in range(image.num_samples)]
        for (place, number), own, start in zip(chosen, by_model, by_start, strict=True):
            found[place].sampled_log_probs[number], found[place].start_log_probs[number] = own, start
