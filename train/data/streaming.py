"""Data sets that are read while training: streams of the library `datasets`, split among ranks and workers."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info
from transformers.utils import logging

from .captions import (
    ALL,
    CAPTION_COLUMNS,
    CAPTION_LINES,
    IMAGE_COLUMNS,
    RANDOM,
    WHOLE,
    alternatives,
    find_column,
    find_prompt_column,
    require_text,
    sidecar_captions,
)
from .mixture import TrainingDataset, augmentation, drawn
from .paths import named_image
from .source import EncodedImage, Source

logger = logging.get_logger(__name__)

STATE = "data_state"
"""Key of an item or batch under which a worker says where its streams stand."""
EPOCHS_PER_SEED = 10**6
GOLDEN_RATIO = 0.6180339887498949
WEBDATASET_COLUMNS = {"__key__", "__url__"}
"""Columns that `datasets` adds to those of tar files."""

JSON_COLUMN = "json"

State = dict[str, Any]
Sample = tuple[dict[str, Any], Callable[[], State]]
"""An item, and a function that gives the reader's state after it until the next item is asked for."""


class StreamSource:
    """Images, with captions or without, of a `datasets.IterableDataset`.

    Args:
        stream: The data set.
        name: What messages call it.
        caption_column: None for images alone.
        folder: The folder that relative image paths start from; by default the working directory.
        repository: `org/name` on the Hub that the stream comes from, which bounds the images that it may name.

    Raises:
        ValueError: If a column is missing, or that of instructions holds no text.
    """

    def __init__(
        self,
        stream: Any,
        name: str,
        image_column: str,
        caption_column: str | None,
        folder: str | os.PathLike | None = None,
        repository: str | None = None,
        prompt_column: str | None = None,
    ):
        names = stream.column_names or list(next(iter(stream)))
        columns = {"image": find_column(names, image_column, IMAGE_COLUMNS, name)}
        if caption_column is not None:
            columns["caption"] = find_column(names, caption_column, CAPTION_COLUMNS, name)
        self.has_sidecars = set(names) >= WEBDATASET_COLUMNS
        """Whether captions are files, whose lines are captions of their own."""
        self.prompt_column = prompt_column
        if self.has_sidecars:
            keys = _keys_of_json(stream, names)
            if find_prompt_column(keys, prompt_column, columns.get("caption"), f"{name} (the .json files in it)"):
                columns["prompt"] = JSON_COLUMN
        elif prompt := find_prompt_column(names, prompt_column, columns.get("caption"), name):
            if stream.features is not None:
                require_text(stream.features.arrow_schema.field(prompt).type, prompt, name)
            columns["prompt"] = prompt
        if stream.features is not None:
            stream = stream.decode(False)  # before columns are selected: streams of the Hub decode as they read
        stream = stream.select_columns(list(dict.fromkeys(columns.values())))
        self.stream, self.name, self.columns = stream, name, columns
        self.has_captions, self.has_prompts = caption_column is not None, "prompt" in columns
        self.folder, self.repository = folder, repository

    def image(self, row: dict[str, Any], name: str) -> Any:
        """The image of a row. `name` is what messages call it if it has no name of its own."""
        image = row[self.columns["image"]]
        if isinstance(image, dict):
            name = image.get("path") or name
            image = image.get("bytes") or image.get("path")
        if isinstance(image, str):
            image = named_image(image, self.folder, self.repository)
        return EncodedImage.named(image, name) if isinstance(image, bytes) else image

    def caption(self, row: dict[str, Any], caption_lines: str) -> Any:
        """Text, a list of texts, or what else the row has in their place."""
        value = row[self.columns["caption"]]
        if self.has_sidecars and isinstance(value, str):
            captions = sidecar_captions(value, caption_lines)
            return captions if len(captions) > 1 else "".join(captions)
        return value

    def prompt(self, row: dict[str, Any]) -> Any:
        """The instruction of a row; None if it has none."""
        value = row[self.columns["prompt"]] if self.has_prompts else None
        if not self.has_sidecars:
            return value
        return value.get(self.prompt_column) if isinstance(value, dict) else None

    def first_prompts(self, count: int) -> list[Any]:
        """The instructions of the first rows. The training reads these rows again."""
        return [self.prompt(row) for row in islice(_rows(self.stream), count)] if self.has_prompts else []

    def first_captions(self, count: int, caption_lines: str) -> list[Any]:
        """The captions of the first rows. The training reads these rows again."""
        return [self.caption(row, caption_lines) for row in islice(_rows(self.stream), count)]


def _keys_of_json(stream: Any, names: Sequence[str]) -> Sequence[str]:
    """The keys of the `.json` files of a stream of tar files, by its features or its first sample."""
    if JSON_COLUMN not in names:
        return ()
    values = stream.features[JSON_COLUMN] if stream.features is not None else next(iter(stream))[JSON_COLUMN]
    return list(values) if isinstance(values, dict) else ()


def _rows(stream: Any) -> Iterator[dict[str, Any]]:
    for row in stream.iter(batch_size=1):  # __iter__ would split the shards by worker once more
        yield {name: values[0] for name, values in row.items()}


@dataclass(frozen=True)
class _Rules:
    """What is drawn for each sample. `number` is that of the source."""

    caption_lines: str
    seed: int
    number: int
    shuffle: bool
    random_crop: bool
    horizontal_flip: bool

    def drawn(self, *seed: int) -> np.random.Generator:
        return drawn(self.seed, *seed, *([self.number] if self.number else []))

    def captions(self, value: Any, *place: int) -> list[Any]:
        """The captions of a row's samples; of a value that is not text, the collator says what is wrong with it."""
        captions = None if isinstance(value, str) else alternatives(value)
        if not captions:
            return [value]
        if self.caption_lines == ALL:
            return captions
        if self.caption_lines == WHOLE:
            return ["\n".join(captions)]
        which = int(self.drawn(2, *place).integers(len(captions))) if self.caption_lines == RANDOM else 0
        return [captions[which]]


class StreamPart:
    """A stream in a mixture: an endless sequence of samples for each reader, pass after pass.

    Each reader reads shards of its own; where there are fewer shards than readers, each reads all and keeps its part.
    The order of shards is shuffled by seed and pass. There is no shuffle buffer, which would be lost on resume.
    """

    def __init__(self, source: StreamSource, rules: _Rules):
        self.source, self.rules, self.name = source, rules, source.name
        self.has_captions = source.has_captions

    def layout(self) -> list[Any]:
        """What a state of a reader is good for."""
        return [str(self.source.stream.features), self.source.stream.num_shards]

    def fingerprint(self) -> str:
        """A hash of the name, the columns and the number of shards: what is known before anything is read."""
        known = (self.name, str(self.source.stream.features), self.source.stream.num_shards)
        return hashlib.sha256(repr(known).encode()).hexdigest()

    def samples(self, node: int, num_nodes: int, state: State | None) -> Iterator[Sample]:
        """The samples of one reader of `num_nodes`, from a state on."""
        from datasets.distributed import split_dataset_by_node

        whole, rules = self.source.stream, self.rules
        strategy = "shards" if whole.num_shards >= num_nodes else "examples"
        state = state or {"pass": 0, "seen": 0, "stream": None, "captions": 0}
        completed, seen, start, used = state["pass"], state["seen"], state["stream"], state["captions"]
        while True:
            stream = split_dataset_by_node(whole, node, num_nodes, strategy=strategy)
            if rules.shuffle:  # of an epoch other than 0 `datasets` shuffles the shards, by a seed that is the epoch
                stream.set_epoch(1 + (rules.seed % 2**32) * EPOCHS_PER_SEED + completed)
            if start is not None:
                stream.load_state_dict(start)
            for row in _rows(stream):
                place = (completed, node, seen)
                captions: list[Any] = [None]
                if self.has_captions:
                    captions = rules.captions(self.source.caption(row, rules.caption_lines), *place)
                for number in range(used, len(captions)):
                    seen += 1
                    item = self._item(row, captions[number], completed, node, seen - 1)
                    rest = (start, number + 1) if number + 1 < len(captions) else (stream, 0)
                    yield item, partial(_state, completed, seen, *rest)
                used = 0
                if rules.caption_lines == ALL:
                    start = stream.state_dict()  # the state before the next row, whose captions may be cut by a save
            if not seen:
                raise ValueError(
                    f"{self.name} has no samples for reader {node + 1} of {num_nodes}; lower "
                    "dataloader_num_workers, or read it without streaming"
                )
            completed, seen, start, used = completed + 1, 0, None, 0

    def _item(self, row: dict[str, Any], caption: Any, completed: int, node: int, seen: int) -> dict[str, Any]:
        name = f"{self.name}, pass {completed}, reader {node}, sample {seen}"
        item: dict[str, Any] = {"image": self.source.image(row, name)}
        if self.has_captions:
            item["caption"] = caption
        if self.source.has_prompts:
            item["prompt"] = self.source.prompt(row)
        if self.rules.random_crop or self.rules.horizontal_flip:
            random = self.rules.drawn(1, completed, node, seen)
            item["augmentation"] = augmentation(random, self.rules.random_crop, self.rules.horizontal_flip)
        return item


def _state(completed: int, seen: int, stream: Any, used: int) -> State:
    """Args: `stream`: a stream, its state, or None for its beginning; `used`: captions of the next row."""
    if hasattr(stream, "state_dict"):
        stream = stream.state_dict()
    return {"pass": completed, "seen": seen, "stream": stream, "captions": used}


class IndexedPart:
    """A source whose rows have numbers, in a mixture with streams."""

    def __init__(self, dataset: TrainingDataset, name: str, shuffle: bool):
        self.dataset, self.name, self.shuffle = dataset, name, shuffle
        self.has_captions = dataset.parts[0].source.has_captions

    def layout(self) -> list[Any]:
        return [len(self.dataset)]

    def fingerprint(self) -> str:
        return self.dataset.fingerprint()

    def samples(self, node: int, num_nodes: int, state: State | None) -> Iterator[Sample]:
        """The samples of one reader of `num_nodes`, from a state on: its share of a random order, pass after pass."""
        completed, seen = (state["pass"], state["seen"]) if state else (0, 0)
        if node >= len(self.dataset):
            raise ValueError(
                f"{self.name} has no samples for reader {node + 1} of {num_nodes}; lower dataloader_num_workers, or "
                "give it more samples"
            )
        while True:
            order = np.arange(len(self.dataset))
            if self.shuffle:
                order = self.dataset.order(completed, num_ranks=num_nodes)
            own = order[node::num_nodes].copy()
            del order
            for number in range(seen, len(own)):
                state = {"pass": completed, "seen": number + 1}
                yield self.dataset[completed, int(own[number])], state.copy
            completed, seen = completed + 1, 0


class StreamingDataset(IterableDataset):
    """An endless stream of `{"image": ..., "caption": text}` from several sources, of which some are streams.

    Each worker of each rank reads samples of its own. `weights` are shares of the samples, whatever the sizes of the
    sources, which are not known. Each source is read pass after pass, each sample once a pass.

    Args:
        sources: Streams, and sources whose rows have numbers.
        names: What messages call those of the latter; by default their numbers.
        weights: Of each source; by default all have the same.
        caption_lines, on_bad_caption, random_crop, horizontal_flip: As in [`TrainingDataset`]. Samples of one row
            (`caption_lines` is `"all"`) come one after the other. Bad captions of streams are found while training.

    Raises:
        ValueError: If an argument has no such value.
    """

    def __init__(
        self,
        sources: Sequence[StreamSource | Source],
        weights: Sequence[float] | None = None,
        *,
        names: Sequence[str] | None = None,
        caption_lines: str = "first",
        on_bad_caption: str = "skip",
        seed: int = 0,
        shuffle: bool = True,
        random_crop: bool = False,
        horizontal_flip: bool = False,
    ):
        if caption_lines not in CAPTION_LINES:
            raise ValueError(f"caption_lines is {caption_lines!r}; expected one of {CAPTION_LINES}")
        self.weights = [1.0] * len(sources) if weights is None else list(weights)
        self.seed, self.caption_lines = seed, caption_lines
        plain: dict[str, Any] = {"random_crop": random_crop, "horizontal_flip": horizontal_flip}
        self.parts: list[StreamPart | IndexedPart] = []
        for number, source in enumerate(sources):
            if isinstance(source, StreamSource):
                self.parts.append(StreamPart(source, _Rules(caption_lines, seed, number, shuffle, **plain)))
                continue
            own_seed = int(drawn(seed, 6, number).integers(2**32))
            rules: dict[str, Any] = {
                "caption_lines": caption_lines,
                "on_bad_caption": on_bad_caption,
                "seed": own_seed,
            }
            dataset = TrainingDataset([source], **rules, **plain)
            self.parts.append(IndexedPart(dataset, names[number] if names else f"source {number}", shuffle))
        self._ends = np.cumsum(self.weights) / np.sum(self.weights)
        self._ends[-1] = 1.0
        self.batch_size, self.rank, self.num_ranks = 1, 0, 1
        self.progress: dict[str, Any] = {"workers": 1, "ranks": 1, "next": 0, "states": {}, "layout": self.layout()}

    def layout(self) -> list[Any]:
        """What the progress of a checkpoint is good for."""
        return [part.layout() for part in self.parts]

    def shares(self) -> list[float]:
        """Of the samples, by source."""
        return np.diff(self._ends, prepend=0.0).tolist()

    def set_loader(self, batch_size: int, num_workers: int, rank: int, num_ranks: int) -> None:
        """Says how the streams are read: the batch size and the number of workers of this rank, and the ranks.

        Other data than that of a checkpoint is read from its beginning.

        Raises:
            ValueError: If the progress of a checkpoint is of another number of ranks or workers.
        """
        self.batch_size, self.rank, self.num_ranks = batch_size, rank, num_ranks
        workers = max(num_workers, 1)
        if self.progress["states"] and self.progress.get("layout") != self.layout():
            logger.warning("the data is not that of the checkpoint, and is read from its beginning")
            self.progress |= {"states": {}, "next": 0}
        if self.progress["states"] and self.progress["ranks"] != num_ranks:
            raise ValueError(
                f"the checkpoint's stream was read on {self.progress['ranks']} devices, so that their number cannot "
                f"be {num_ranks} before the run ends; start as many processes"
            )
        if self.progress["states"] and self.progress["workers"] != workers:
            raise ValueError(
                f"the checkpoint's stream was read by {self.progress['workers']} workers on each device, so that "
                f"dataloader_num_workers cannot be {num_workers} before the run ends"
            )
        self.progress |= {"workers": workers, "ranks": num_ranks, "layout": self.layout()}

    def record(self, state: State) -> None:
        """Notes the state that came with a batch, when the batch has been used."""
        self.progress["states"][str(state["worker"])] = state
        self.progress["next"] = (state["worker"] + 1) % self.progress["workers"]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        number, count = (info.id, info.num_workers) if info is not None else (0, 1)
        number = (number + self.progress["next"]) % count  # the loader begins with its worker 0
        state = self.progress["states"].get(str(number), {"samples": 0, "parts": [None] * len(self.parts)})
        node, num_nodes = self.rank * count + number, self.num_ranks * count
        samples = [part.samples(node, num_nodes, own) for part, own in zip(self.parts, state["parts"], strict=True)]
        states: list[Callable[[], State | None]] = [partial(_same, own) for own in state["parts"]]
        start, taken, since_batch = float(drawn(self.seed, 7, node).random()), state["samples"], 0
        while True:
            # Multiples of the golden ratio cover 0..1 evenly, so that each source has its share of any few batches.
            which = int(np.searchsorted(self._ends, (start + taken * GOLDEN_RATIO) % 1.0, side="right"))
            item, states[which] = next(samples[which])
            taken, since_batch = taken + 1, (since_batch + 1) % self.batch_size
            if since_batch == 0:
                item[STATE] = {"worker": number, "samples": taken, "parts": [state() for state in states]}
            yield item

    def fingerprint(self) -> str:
        """A hash of the sources' fingerprints and weights."""
        hashes = [part.fingerprint() for part in self.parts]
        if len(hashes) == 1:
            return hashes[0]
        return hashlib.sha256(repr([*zip(hashes, self.weights, strict=True)]).encode()).hexdigest()


def _same(state: State | None) -> State | None:
    return state


class StreamCollator:
    """Makes a batch of items by another collator, and passes on the state that the last of them carries."""

    def __init__(self, collator: Callable[[list[dict]], dict[str, Any]]):
        self.collator = collator

    def __call__(self, items: list[dict]) -> dict[str, Any]:
        states = [item.pop(STATE) for item in items if STATE in item]
        return self.collator(items) | ({STATE: states[-1]} if states else {})
