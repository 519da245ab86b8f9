"""Data sets that are read while training: streams of the library `datasets`, split among ranks and workers."""

import hashlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from .captions import (
    ALL,
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    RANDOM,
    WHOLE,
    alternatives,
    find_column,
)
from .mixture import augmentation, drawn
from .paths import named_image
from .source import EncodedImage

STATE = "data_state"
"""Key of an item or batch under which a worker says where its stream stands."""
EPOCHS_PER_SEED = 10**6


class StreamingDataset(IterableDataset):
    """An endless stream of `{"image": ..., "caption": text}`: pass after pass over a `datasets.IterableDataset`.

    Each worker of each rank reads shards of its own; where there are fewer shards than workers, each reads all and
    keeps its part. The order of shards is shuffled by seed and pass. There is no shuffle buffer, which would be lost
    on resume.

    Args:
        stream: The data set.
        name: What messages call it.
        caption_column: None for images alone.
        caption_lines: As in [`TrainingDataset`]; not `"all"`.
        folder: The folder that relative image paths start from; by default the working directory.
        repository: `org/name` on the Hub that the stream comes from, which bounds the images that it may name.

    Raises:
        ValueError: If a column is missing, or an argument has no such value.
    """

    def __init__(
        self,
        stream: Any,
        name: str,
        image_column: str,
        caption_column: str | None,
        *,
        caption_lines: str = "first",
        seed: int = 0,
        shuffle: bool = True,
        random_crop: bool = False,
        horizontal_flip: bool = False,
        folder: str | os.PathLike | None = None,
        repository: str | None = None,
    ):
        if caption_lines == ALL:
            raise ValueError("caption_lines 'all' is not possible with streaming; use 'random' or 'first'")
        from datasets import Image

        names = stream.column_names or list(next(iter(stream)))
        columns = {"image": find_column(names, image_column, IMAGE_COLUMNS, name)}
        if caption_column is not None:
            columns["caption"] = find_column(names, caption_column, CAPTION_COLUMNS, name)
        stream = stream.select_columns(list(dict.fromkeys(columns.values())))
        if stream.features is not None and isinstance(stream.features[columns["image"]], Image):
            stream = stream.cast_column(columns["image"], Image(decode=False))
        self.stream, self.source_name, self.columns = stream, name, columns
        self.caption_lines, self.seed, self.shuffle = caption_lines, seed, shuffle
        self.random_crop, self.horizontal_flip = random_crop, horizontal_flip
        self.has_captions = caption_column is not None
        self.folder, self.repository = folder, repository
        self.batch_size, self.rank, self.num_ranks = 1, 0, 1
        self.progress: dict[str, Any] = {"workers": 1, "ranks": 1, "next": 0, "states": {}}

    def set_loader(self, batch_size: int, num_workers: int, rank: int, num_ranks: int) -> None:
        """Says how the stream is read: the batch size and the number of workers of this rank, and the ranks.

        Raises:
            ValueError: If the progress of a checkpoint is of another number of ranks or workers.
        """
        self.batch_size, self.rank, self.num_ranks = batch_size, rank, num_ranks
        workers = max(num_workers, 1)
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
        self.progress["workers"], self.progress["ranks"] = workers, num_ranks

    def record(self, state: dict[str, Any]) -> None:
        """Notes the state that came with a batch, when the batch has been used."""
        self.progress["states"][str(state["worker"])] = state
        self.progress["next"] = (state["worker"] + 1) % self.progress["workers"]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        number, count = (info.id, info.num_workers) if info is not None else (0, 1)
        number = (number + self.progress["next"]) % count  # the loader begins with its worker 0
        state = self.progress["states"].get(str(number), {"pass": 0, "seen": 0, "stream": None})
        since_batch, node = 0, self.rank * count + number
        for completed, seen, row, where in self._rows(node, self.num_ranks * count, state):
            item = self._item(row, completed, node, seen)
            since_batch = (since_batch + 1) % self.batch_size
            if since_batch == 0:
                item[STATE] = {"worker": number, "pass": completed, "seen": seen + 1, "stream": where()}
            yield item

    def _rows(
        self, node: int, num_nodes: int, state: dict[str, Any]
    ) -> Iterator[tuple[int, int, dict[str, Any], Callable[[], Any]]]:
        """`(pass, samples of the pass before it, row, function that gives the state after it)` of one reader."""
        from datasets.distributed import split_dataset_by_node

        whole = self.stream
        strategy = "shards" if whole.num_shards >= num_nodes else "examples"
        completed, seen, start = state["pass"], state["seen"], state["stream"]
        while True:
            stream = split_dataset_by_node(whole, node, num_nodes, strategy=strategy)
            if self.shuffle:  # of an epoch other than 0 `datasets` shuffles the shards, by a seed that is the epoch
                stream.set_epoch(1 + (self.seed % 2**32) * EPOCHS_PER_SEED + completed)
            if start is not None:
                stream.load_state_dict(start)
            for row in stream.iter(batch_size=1):  # __iter__ would split the shards by worker once more
                yield completed, seen, {name: values[0] for name, values in row.items()}, stream.state_dict
                seen += 1
            if not seen:
                raise ValueError(
                    f"{self.source_name} has no samples for reader {node + 1} of {num_nodes}; lower "
                    "dataloader_num_workers, or read it without streaming"
                )
            completed, seen, start = completed + 1, 0, None

    def _item(self, row: dict[str, Any], completed: int, node: int, seen: int) -> dict[str, Any]:
        image = row[self.columns["image"]]
        name = f"{self.source_name}, pass {completed}, reader {node}, sample {seen}"
        if isinstance(image, dict):
            name = image.get("path") or name
            image = image.get("bytes") or image.get("path")
        if isinstance(image, str):
            image = named_image(image, self.folder, self.repository)
        item: dict[str, Any] = {"image": EncodedImage.named(image, name) if isinstance(image, bytes) else image}
        if self.has_captions:
            value = row[self.columns["caption"]]
            captions = alternatives(value)
            if isinstance(value, str) or not captions:
                item["caption"] = value
            elif self.caption_lines == WHOLE:
                item["caption"] = "\n".join(captions)
            else:
                place = int(drawn(self.seed, 2, completed, node, seen).integers(len(captions)))
                item["caption"] = captions[place if self.caption_lines == RANDOM else 0]
        if self.random_crop or self.horizontal_flip:
            random = drawn(self.seed, 1, completed, node, seen)
            item["augmentation"] = augmentation(random, self.random_crop, self.horizontal_flip)
        return item

    def fingerprint(self) -> str:
        """A hash of the name, the columns and the number of shards: what is known before anything is read."""
        known = (self.source_name, str(self.stream.features), self.stream.num_shards)
        return hashlib.sha256(repr(known).encode()).hexdigest()


class StreamCollator:
    """Makes a batch of items by another collator, and passes on the state that the last of them carries."""

    def __init__(self, collator: Callable[[list[dict]], dict[str, Any]]):
        self.collator = collator

    def __call__(self, items: list[dict]) -> dict[str, Any]:
        states = [item.pop(STATE) for item in items if STATE in item]
        return self.collator(items) | ({STATE: states[-1]} if states else {})
