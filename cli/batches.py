"""Inputs of `vlv caption`, `vlv encode` and `vlv reconstruct`, read and gathered into batches."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from PIL import Image

from vlv import VLVImageProcessor

from .inputs import Input
from .output import Summary


@dataclass(frozen=True)
class Batch:
    """Inputs that a model takes at once.

    Args:
        inputs: The inputs themselves.
        tensors: `{"pixel_values": (B, 3, height, width)}` or `{"caption_embeds": (B, Q, d_text)}`.
        originals: One for each input: the image at the size that was asked for, or None for embeddings.
    """

    inputs: list[Input]
    tensors: dict[str, torch.Tensor]
    originals: list[Image.Image | None]

    @property
    def names(self) -> list[str]:
        """One for each input."""
        return [item.name for item in self.inputs]


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
        identify: Whether the inputs of a batch have their `identity`, which is taken before the file is read.
    """
    rows: list[Batch] = []
    for item in inputs:
        try:
            if identify and item.problem is None:
                item = replace(item, identity=item.identify())
            row = _read(item, image_processor, original_size)
        except ValueError as error:
            summary.fail(item.name, str(error))
            continue
        except OSError as error:
            summary.fail(item.name, f"it cannot be read: {error.strerror}")
            continue
        if rows and _shapes(rows[0]) != _shapes(row):
            yield _join(rows)
            rows = []
        rows.append(row)
        if len(rows) == batch_size:
            yield _join(rows)
            rows = []
    if rows:
        yield _join(rows)


def _read(item: Input, image_processor: VLVImageProcessor, original_size: int | None) -> Batch:
    """A batch of one input. Raises `ValueError` with the reason if it cannot be read."""
    if item.problem is not None:
        raise ValueError(item.problem)
    if item.embeds is not None:
        return Batch([item], {"caption_embeds": item.embeds[None]}, [None])
    image = image_processor.load(item.path)
    pixel_values = image_processor(image, return_tensors="pt").pixel_values  # (1, 3, height, width)
    original = None
    if original_size is not None:
        original = image.resize((original_size, original_size), Image.Resampling.BICUBIC)
    return Batch([item], {"pixel_values": pixel_values}, [original])


def _shapes(batch: Batch) -> list[torch.Size]:
    return [tensor.shape[1:] for tensor in batch.tensors.values()]


def _join(rows: list[Batch]) -> Batch:
    return Batch(
        inputs=[item for row in rows for item in row.inputs],
        tensors={key: torch.cat([row.tensors[key] for row in rows]) for key in rows[0].tensors},
        originals=[original for row in rows for original in row.originals],
    )
