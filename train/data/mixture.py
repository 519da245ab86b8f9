"""The data of a training: several sources with weights, the order of an epoch, and what is drawn for each sample."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from .captions import (
    ALL,
    CAPTION_LINES,
    MOST_NAMED,
    RANDOM,
    WHOLE,
    alternatives,
    check_prompt,
    report_bad_captions,
    report_several_captions,
)
from .source import Source, UnreadableImage

STEPS_SORTED_TOGETHER = 50
"""Grouping by length sorts the samples of so many steps."""
BLOCK = 2**14
"""Rows of a source without shards among which the samples of a fractional weight are drawn."""
Index = int | tuple[int, int]


class _Part:
    """A source with a weight: `weight` times a source's samples each epoch.

    The places of an epoch are `range(len(part))`: as many complete passes as fit into the weight, then a share of each
    shard that is drawn anew each epoch.
    """

    def __init__(self, source: Source, weight: float, caption_lines: str, seed: tuple[int, ...], on_bad_caption: str):
        self.source, self.weight, self.seed = source, weight, seed
        self.rows: np.ndarray | None = None  # of each sample, if some rows are left out or give several
        self.captions: np.ndarray | None = None  # which of the row's captions, if all are samples
        self.left_out = np.zeros(0, np.int64)  # rows without a caption
        shards = np.asarray(source.shard_sizes(), dtype=np.int64)
        if source.has_captions:
            self.counts = counts = source.count_captions()
            bad = np.flatnonzero(counts < 1)
            report_several_captions(counts, caption_lines)
            report_bad_captions([source.name(int(row)) for row in bad[:MOST_NAMED]], counts, on_bad_caption)
            self.left_out = bad
            repeats = counts.clip(0) if caption_lines == ALL else (counts > 0).astype(np.int64)
            if (repeats != 1).any():
                self.rows = np.repeat(np.arange(len(source)), repeats)
                ends = np.cumsum(repeats)
                if caption_lines == ALL:
                    self.captions = np.arange(len(self.rows)) - (ends - repeats)[self.rows]
                if len(shards):
                    shards = np.diff(np.concatenate([[0], ends])[np.cumsum([0, *shards])])
        self.size = len(source) if self.rows is None else len(self.rows)
        self.has_shards = len(shards) > 0
        if not self.has_shards:
            shards = np.diff(np.append(np.arange(0, self.size, BLOCK), self.size))
        self._ends = np.cumsum(shards)  # of the shards, in samples
        self._passes = int(weight)
        # The share of shard i is drawn_ends[i] - drawn_ends[i - 1].
        self._drawn_ends = np.round((weight - self._passes) * self._ends).astype(np.int64)
        self._drawn: tuple[tuple[int, int], np.ndarray] = ((-1, -1), np.zeros(0, np.int64))

    def __len__(self) -> int:
        drawn = int(self._drawn_ends[-1]) if len(self._drawn_ends) else 0
        return self._passes * self.size + drawn

    def shard_ends(self) -> np.ndarray:
        """The places where the shards of an epoch end."""
        ends = [self._ends + number * self.size for number in range(self._passes)]
        if len(self._drawn_ends) and self._drawn_ends[-1]:
            ends.append(self._drawn_ends + self._passes * self.size)
        return np.concatenate(ends) if ends else np.zeros(0, np.int64)

    def sample(self, place: int, epoch: int) -> int:
        """The number of the sample at a place of an epoch."""
        if place < self._passes * self.size:
            return place % self.size
        place -= self._passes * self.size
        shard = int(np.searchsorted(self._drawn_ends, place, side="right"))
        start = int(self._ends[shard - 1]) if shard else 0
        first = int(self._drawn_ends[shard - 1]) if shard else 0
        if self._drawn[0] != (epoch, shard):
            order = drawn(*self.seed, epoch, shard).permutation(int(self._ends[shard]) - start)
            self._drawn = ((epoch, shard), order)
        return start + int(self._drawn[1][place - first])

    def row(self, sample: int) -> int:
        return sample if self.rows is None else int(self.rows[sample])


def drawn(*seed: int) -> np.random.Generator:
    """Random numbers that depend on whole numbers alone."""
    return np.random.default_rng(np.random.SeedSequence(seed))


def augmentation(random: np.random.Generator, random_crop: bool, horizontal_flip: bool) -> dict[str, Any]:
    """`{"crop": (x, y)}` with the place of a crop as shares in 0..1, and `{"flip": whether}`."""
    x, y, side = random.random(3)
    crop = {"crop": (float(x), float(y))} if random_crop else {}
    return crop | ({"flip": bool(side < 0.5)} if horizontal_flip else {})


class TrainingDataset(Dataset):
    """Sources with weights, as one data set. Items are `{"image": ..., "caption": text, "prompt": instruction}`.

    Caption and instruction are there if the source has them.

    An index is a place of the first epoch, or `(epoch, place)`: `epoch` decides what is drawn at random. An item
    depends on nothing else, so that a resumed run sees the items of an unbroken one.

    Args:
        sources: Sources; a weight says how many times the samples of a source are seen in an epoch. For a
            fractional part other samples are drawn each epoch.
        caption_lines: Which of several captions of an image counts: `"first"`, `"random"` (one, drawn anew each
            epoch), `"all"` (each is a sample), or `"whole"` (joined by line breaks).
        on_bad_caption: `"skip"` or `"error"`: for captions that are empty or not text.
        random_crop, horizontal_flip: Adds `"augmentation"` to items: `{"crop": (x, y)}` with the place of the crop as
            shares in 0..1, and `{"flip": whether}`.

    Raises:
        ValueError: If an argument has no such value, a source is empty, or all captions are bad.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float] | None = None,
        *,
        caption_lines: str = "first",
        on_bad_caption: str = "skip",
        seed: int = 0,
        random_crop: bool = False,
        horizontal_flip: bool = False,
    ):
        if caption_lines not in CAPTION_LINES:
            raise ValueError(f"caption_lines is {caption_lines!r}; expected one of {CAPTION_LINES}")
        if on_bad_caption not in ("skip", "error"):
            raise ValueError(f"on_bad_caption is {on_bad_caption!r}; expected 'skip' or 'error'")
        self.weights = [1.0] * len(sources) if weights is None else list(weights)
        for weight in self.weights:
            if not 0 < weight < float("inf"):
                raise ValueError(f"the weight of a source is {weight}; expected a number above 0: passes per epoch")
        self.seed, self.caption_lines = seed, caption_lines
        self.random_crop, self.horizontal_flip = random_crop, horizontal_flip
        self.held_back: TrainingDataset | None = None
        """Samples of the same sources that are not trained on."""
        self.parts = [
            _Part(source, weight, caption_lines, (seed, number), on_bad_caption)
            for number, (source, weight) in enumerate(zip(sources, self.weights, strict=True))
        ]
        self._ends = np.cumsum([len(part) for part in self.parts])
        if not len(self):
            raise ValueError("the data has no samples; give more of it, or a greater weight")

    def __len__(self) -> int:
        """The number of samples in an epoch."""
        return int(self._ends[-1])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[place] for place in range(len(self)))

    def locate(self, index: Index) -> tuple[int, int, int]:
        """The part, the row of its source, and the number of the sample in the part."""
        epoch, place = index if isinstance(index, tuple) else (0, int(index))
        if not -len(self) <= place < len(self):
            raise IndexError(f"index {place} of {len(self)} samples")
        place %= len(self)
        number = int(np.searchsorted(self._ends, place, side="right"))
        part = self.parts[number]
        sample = part.sample(place - int(self._ends[number] - len(part)), epoch)
        return number, part.row(sample), sample

    def caption(self, index: Index) -> Any:
        """The caption of an item, without reading its image where that can be avoided; None if it cannot be read."""
        number, row, sample = self.locate(index)
        epoch, place = index if isinstance(index, tuple) else (0, int(index))
        try:
            value = self.parts[number].source.caption(row)
        except (OSError, ValueError):
            return None
        return self._caption(self.parts[number], value, sample, epoch, place)

    @property
    def has_prompts(self) -> bool:
        """Whether a source has instructions."""
        return any(part.source.has_prompts for part in self.parts)

    def prompt(self, index: Index) -> str:
        """The instruction of an item, without reading its image where that can be avoided; "" for none."""
        number, row, _ = self.locate(index)
        try:
            return check_prompt(self.parts[number].source.prompt(row), "")
        except (OSError, ValueError):
            return ""

    def text_length(self, index: Index) -> int:
        """Characters of the instruction and the caption of an item; of one without words 0."""
        caption = self.caption(index)
        return len(caption) + len(self.prompt(index)) if isinstance(caption, str) else 0

    def name(self, index: Index) -> str:
        """What messages call a sample."""
        number, row, _ = self.locate(index)
        return self.parts[number].source.name(row)

    def __getitem__(self, index: Index) -> dict[str, Any]:
        number, row, sample = self.locate(index)
        part = self.parts[number]
        epoch, place = index if isinstance(index, tuple) else (0, int(index))
        try:
            item = dict(part.source[row])
        except (OSError, ValueError) as error:
            item = {"image": UnreadableImage(part.source.name(row), str(error))}
        if part.source.has_captions and "caption" in item:
            item["caption"] = self._caption(part, item["caption"], sample, epoch, place)
        if self.random_crop or self.horizontal_flip:
            random = drawn(self.seed, 1, epoch, place)
            item["augmentation"] = augmentation(random, self.random_crop, self.horizontal_flip)
        return item

    def _caption(self, part: _Part, value: Any, sample: int, epoch: int, place: int) -> Any:
        captions = None if isinstance(value, str) else alternatives(value)
        if not captions:
            return value  # of a value that is not text, the collator says what is wrong with it
        if self.caption_lines == WHOLE:
            return "\n".join(captions)
        which = 0
        if part.captions is not None:
            which = int(part.captions[sample])
        elif self.caption_lines == RANDOM:
            which = int(drawn(self.seed, 2, epoch, place).integers(len(captions)))
        return captions[which]

    def order(self, epoch: int, *, batch_size: int = 1, num_ranks: int = 1, seed: int | None = None) -> np.ndarray:
        """`(len(self),)`: the places of an epoch in random order, each once.

        Samples of a source with shards come shard after shard, the shards in random order and the samples of each in
        random order. The batches of each rank take turns among a few such sequences, so that each process of a data
        loader reads few shards at a time. Samples of several sources are mixed.
        """
        seed = self.seed if seed is None else seed
        if not any(part.has_shards for part in self.parts):
            generator = torch.Generator()
            generator.manual_seed(epoch + seed)
            return torch.randperm(len(self), generator=generator).numpy()
        orders = []
        for number, part in enumerate(self.parts):
            random, start = drawn(seed, 3, epoch, number), int(self._ends[number]) - len(part)
            if not part.has_shards:
                orders.append(start + random.permutation(len(part)))
                continue
            ends = part.shard_ends()
            shards = [np.arange(a, b) for a, b in zip(np.concatenate([[0], ends]), ends, strict=False) if b > a]
            pieces = [random.permutation(shards[i]) for i in random.permutation(len(shards))]
            orders.append(start + np.concatenate(pieces))
        order = orders[0]
        if len(orders) > 1:
            labels = np.repeat(np.arange(len(orders)), [len(o) for o in orders])
            labels = drawn(seed, 4, epoch).permutation(labels)
            order = np.empty(len(self), dtype=np.int64)
            for number, sequence in enumerate(orders):
                order[labels == number] = sequence
        streams = min(part.source.num_streams for part in self.parts if part.has_shards)
        batches = len(order) // (num_ranks * streams * batch_size)
        even = order[: num_ranks * streams * batches * batch_size].reshape(num_ranks, streams, batches, batch_size)
        # Batch b is for rank b % num_ranks, whose workers take turns.
        return np.concatenate([even.transpose(2, 1, 0, 3).reshape(-1), order[even.size :]])

    def fingerprint(self) -> str:
        """A hash of the sources' fingerprints and weights."""
        hashes = [part.source.fingerprint() for part in self.parts]
        if len(hashes) == 1 and self.weights == [1.0]:
            return hashes[0]
        return hashlib.sha256(repr([*zip(hashes, self.weights, strict=True)]).encode()).hexdigest()


class EpochSampler(Sampler):
    """Yields `(epoch, place)` of each sample of a `TrainingDataset` once, in an order that the seed and epoch decide.

    Data sets without shards have the order of `accelerate`'s seeded random sampler.

    Args:
        batch_size: Of one process.
        num_ranks: Number of processes that train.
        shuffle: False keeps the order of the data.
        group_by_length: Puts samples of similar length into a batch: those of `STEPS_SORTED_TOGETHER` steps are
            sorted by length, and their batches are shuffled. Captions are read before their images for that.
    """

    def __init__(
        self,
        dataset: TrainingDataset,
        seed: int,
        *,
        batch_size: int = 1,
        num_ranks: int = 1,
        shuffle: bool = True,
        group_by_length: bool = False,
    ):
        self.dataset, self.seed, self.epoch = dataset, seed, 0
        self.batch_size, self.num_ranks, self.shuffle = batch_size, num_ranks, shuffle
        self.group_by_length = group_by_length

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        if self.shuffle:
            order = self.dataset.order(epoch, batch_size=self.batch_size, num_ranks=self.num_ranks, seed=self.seed)
        else:
            order = np.arange(len(self.dataset))
        for place in self._grouped(order, epoch) if self.group_by_length else order:
            yield epoch, int(place)
        self.epoch = epoch + 1

    def _grouped(self, order: np.ndarray, epoch: int) -> Iterator[np.int64]:
        """The same places; those of a step, of all ranks together, have similar lengths."""
        step = self.batch_size * self.num_ranks
        for start in range(0, len(order), step * STEPS_SORTED_TOGETHER):
            places = order[start : start + step * STEPS_SORTED_TOGETHER]
            lengths = [self.dataset.text_length((epoch, int(place))) for place in places]
            places = places[np.argsort(lengths, kind="stable")]
            complete = len(places) // step * step
            steps = drawn(self.seed, 8, epoch, start).permutation(places[:complete].reshape(-1, step))
            yield from np.concatenate([steps.reshape(-1), places[complete:]])
