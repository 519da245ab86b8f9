"""Inputs of `vlv caption`, `vlv encode` and `vlv reconstruct`, read and gathered into batches."""

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from vlv import VLVImageProcessor

from .inputs import Input
from .output import Summary
from .prefetch import chunk_size, prefetch_map

if TYPE_CHECKING:
    from vlv.train.data.feature_cache import FeatureCache


@dataclass(frozen=True)
class Batch:
    """Inputs that a model takes at once.

    Args:
        inputs: The inputs themselves.
        tensors: `{"pixel_values": (B, 3, height, width)}` or `{"caption_embeds": (B, Q, d_text)}`.
        originals: One for each input: the image at the size that was asked for, or None for embeddings.
        keys: Those of a `FeatureCache`, for each image whose embeddings it lacks.
    """

    inputs: list[Input]
    tensors: dict[str, torch.Tensor]
    originals: list[Image.Image | None]
    keys: list[np.ndarray] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """One for each input."""
        return [item.name for item in self.inputs]

    def pin_memory(self) -> "Batch":
        """The batch with its tensors in memory that is copied to a GPU while the program goes on."""
        return replace(self, tensors={name: tensor.pin_memory() for name, tensor in self.tensors.items()})


def read_batches(
    inputs: Iterable[Input],
    image_processor: VLVImageProcessor,
    batch_size: int,
    summary: Summary,
    original_size: int | None = None,
    identify: bool = False,
) -> Iterator[Batch]:
    """Batches of the inputs that can be read; `summary` records the others as failed.

    All inputs are images, or all are embeddings. Embeddings of different numbers of tokens go into different batches.

    Args:
        batch_size: The most inputs of a batch.
        original_size: Width and height in pixels of the originals in a batch; without it they are None.
        identify: Whether the inputs of a batch have their `identity`, which is taken before the file is read. A file
            that changes while it is read fails then.
    """
    yield from join_rows(read_rows(inputs, image_processor, summary, original_size, identify), batch_size)


def read_rows(
    inputs: Iterable[Input],
    image_processor: VLVImageProcessor,
    summary: Summary,
    original_size: int | None = None,
    identify: bool = False,
    cache: "FeatureCache | None" = None,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """As `read_batches`, batches of one input.

    Args:
        cache: Has the caption embeddings of some images, which are taken in place of their pixels.
        num_workers: Processes that prefetch images; 0 reads them in this one. The rows are the same.
        pin_memory: Whether the tensors of prefetched images are pinned, for a GPU.
    """
    reader = RowReader(image_processor, original_size, identify, cache)
    rows = _prefetch_rows(reader, inputs, num_workers, pin_memory) if num_workers else map(reader.read, inputs)
    for row in rows:
        if isinstance(row, Batch):
            yield row
        else:
            summary.fail(*row)


@dataclass(frozen=True)
class RowReader:
    """Reads inputs with the settings of `read_rows`."""

    image_processor: VLVImageProcessor
    original_size: int | None = None
    identify: bool = False
    cache: "FeatureCache | None" = None

    def read(self, item: Input) -> "Batch | Failure":
        """A batch of one input, or why it cannot be read."""
        try:
            if item.problem is None:
                item = item.open()
            if self.identify and item.problem is None:
                item = replace(item, identity=item.identify())
            row = _read(item, self.image_processor, self.original_size, self.cache)
            item.require_unchanged()
            return row
        except ValueError as error:
            return item.name, str(error)
        except OSError as error:
            return item.name, f"it cannot be read: {error.strerror or error}"


Failure = tuple[str, str]
"""The name of an input that cannot be read, and the reason."""


def _prefetch_rows(
    reader: RowReader, inputs: Iterable[Input], num_workers: int, pin_memory: bool
) -> Iterator[Batch | Failure]:
    """What `reader` returns for each input, in their order."""
    size = reader.image_processor.size
    chunk = chunk_size(3 * size["height"] * size["width"] * 4)
    readable = map(_picklable, inputs)
    for batches, failures in prefetch_map(reader.read, readable, num_workers, _join_chunk, chunk, pin_memory):
        rows = (row for batch in batches for row in split_batch(batch))
        for failure in failures:
            yield next(rows) if failure is None else failure


def _picklable(item: Input) -> Input:
    """The input as a worker process can read it: what only this process can open is opened."""
    function = getattr(item.read, "func", item.read)
    if item.read is None or inspect.isfunction(function):
        return item
    try:
        return replace(item.open(), read=None)
    except ValueError as error:
        problem = str(error)
    except OSError as error:
        problem = f"it cannot be read: {error.strerror or error}"
    return replace(item, read=None, problem=problem)


def _join_chunk(rows: list[Batch | Failure]) -> tuple[list[Batch], list[Failure | None]]:
    """The neighbours that can be joined as batches, and for each row None or the failure."""
    batches = join_rows((row for row in rows if isinstance(row, Batch)), len(rows))
    return list(batches), [None if isinstance(row, Batch) else row for row in rows]


def join_rows(rows: Iterable[Batch], batch_size: int) -> Iterator[Batch]:
    """Batches of up to `batch_size` neighbours that have tensors of equal kinds and shapes."""
    joined: list[Batch] = []
    for row in rows:
        if joined and _shapes(joined[0]) != _shapes(row):
            yield _join(joined)
            joined = []
        joined.append(row)
        if len(joined) == batch_size:
            yield _join(joined)
            joined = []
    if joined:
        yield _join(joined)


def _read(
    item: Input, image_processor: VLVImageProcessor, original_size: int | None, cache: "FeatureCache | None"
) -> Batch:
    """A batch of one input. Raises `ValueError` with the reason if it cannot be read."""
    if item.problem is not None:
        raise ValueError(item.problem)
    if item.embeds is not None:
        return Batch([item], {"caption_embeds": item.embeds[None]}, [None])
    image = image_processor.load(item.image)
    item = replace(item, content=None)  # a batch keeps its inputs until it is written
    original = None
    if original_size is not None:
        original = image.resize((original_size, original_size), Image.Resampling.BICUBIC)
    keys = [] if cache is None else [cache.key(image)]
    if cache is not None and (embeds := cache.find(keys[0])) is not None:
        return Batch([item], {"caption_embeds": embeds[None]}, [original])
    pixel_values = image_processor(image, return_tensors="pt").pixel_values  # (1, 3, height, width)
    return Batch([item], {"pixel_values": pixel_values}, [original], keys)


def split_batch(batch: Batch) -> list[Batch]:
    """Batches of one input."""
    return [
        Batch(
            [item],
            {name: tensor[row : row + 1] for name, tensor in batch.tensors.items()},
            [batch.originals[row]],
            batch.keys[row : row + 1],
        )
        for row, item in enumerate(batch.inputs)
    ]


def _shapes(batch: Batch) -> dict[str, torch.Size]:
    return {name: tensor.shape[1:] for name, tensor in batch.tensors.items()}


def _join(rows: list[Batch]) -> Batch:
    return Batch(
        inputs=[item for row in rows for item in row.inputs],
        tensors={key: torch.cat([row.tensors[key] for row in rows]) for key in rows[0].tensors},
        originals=[original for row in rows for original in row.originals],
        keys=[key for row in rows for key in row.keys],
    )
