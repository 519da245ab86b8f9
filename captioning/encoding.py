"""Caption embeddings of inputs: computed in batches of their own, or taken from the cache of `--embeddings-cache`."""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vlv import VLVImageProcessor, VLVModel
from vlv.errors import UserError

from .batches import Batch, join_rows, read_rows, split_batch
from .inputs import Input
from .output import Summary

if TYPE_CHECKING:
    from vlv.train.data.feature_cache import FeatureCache

ENCODER_BATCH_SIZE = 8
"""Images in a pass of the encoder, by default."""


def open_embeddings_cache(
    folder: str | None, model: VLVModel, image_processor: VLVImageProcessor
) -> "FeatureCache | None":
    """The cache of a model's caption embeddings in a folder below `folder`; None without a folder.

    The embeddings have the model's precision, so that they are those that it computes. An image is found by its
    pixels. Models of other weights, settings, preprocessing, precision or kind of device have folders of their own.

    Raises:
        UserError: If the folder cannot be used.
    """
    if folder is None:
        return None
    from vlv.train.caches import PREPROCESSING, settings_fingerprint, weights_fingerprint
    from vlv.train.data.feature_cache import FeatureCache

    config, preprocessing = model.config, json.loads(image_processor.to_json_string())
    parts = (config.image_encoder_config, config.query_decoder_config)
    made_of = {
        "encoder": weights_fingerprint(model),
        "settings": settings_fingerprint(*parts, config.task_prompt_ids, config.attend_all_queries),
        "device": model.device.type,
        **{name: preprocessing.get(name) for name in PREPROCESSING},
    }
    shape = (config.num_query_tokens, config.caption_embed_dim)
    own = Path(folder) / settings_fingerprint(made_of, shape, str(model.dtype))
    try:
        if not own.is_dir() and any(Path(folder).glob("*/*.safetensors")):
            print(
                f"note: --embeddings-cache {folder} has embeddings of another encoder, precision or kind of device; "
                "those of this one are computed",
                file=sys.stderr,
            )
        own.mkdir(parents=True, exist_ok=True)
        return FeatureCache(own, made_of, shape, model.dtype, report_damage=_report_damage)
    except (OSError, ValueError) as error:
        raise UserError(f"--embeddings-cache {folder} cannot be used: {error}") from error


def _report_damage(message: str) -> None:
    print(f"note: {message}; its embeddings are computed again", file=sys.stderr)


def read_encoded_batches(
    inputs: Iterable[Input],
    model: VLVModel,
    image_processor: VLVImageProcessor,
    batch_size: int,
    summary: Summary,
    original_size: int | None = None,
    identify: bool = False,
    *,
    encoder_batch_size: int,
    cache: "FeatureCache | None" = None,
    num_workers: int = 0,
    few_sizes: bool = False,
) -> Iterator[Batch]:
    """As `read_batches`, with the caption embeddings of images, on the CPU, in place of their pixels.

    Args:
        encoder_batch_size: The most images in a pass of the encoder, and the most inputs that are read ahead.
        cache: Has the embeddings of some images, and gets those of the others.
        num_workers: Processes that read images while others are captioned.
        few_sizes: Whether a smaller batch, as each shard has one at its end, is divided by `in_few_sizes`. Tensors of
            many sizes leave the heap of a long run in pieces, so that it grows with the number of shards.
    """
    pin_memory = model.device.type == "cuda"
    rows = read_rows(inputs, image_processor, summary, original_size, identify, cache, num_workers, pin_memory)
    chunks = iter(lambda: list(islice(rows, encoder_batch_size)), [])
    size = encoder_batch_size if few_sizes else None
    encoded = (row for chunk in chunks for row in _encode_rows(chunk, model, cache, size))
    batches = join_rows(encoded, batch_size)
    yield from in_few_sizes(batches, batch_size) if few_sizes else batches


def in_few_sizes(batches: Iterable[Batch], size: int) -> Iterator[Batch]:
    """The batches that have `size` inputs, and of smaller ones parts whose numbers of inputs are powers of two."""
    for batch in batches:
        number = len(batch.inputs)
        if number == size:
            yield batch
            continue
        rows = iter(split_batch(batch))
        for part in (1 << bit for bit in reversed(range(number.bit_length())) if number >> bit & 1):
            yield from join_rows(islice(rows, part), part)


def _encode_rows(rows: list[Batch], model: VLVModel, cache: "FeatureCache | None", size: int | None) -> list[Batch]:
    """Batches of one input with its caption embeddings, in the order of `rows`; with `size` as of `in_few_sizes`."""
    encoded = list(rows)
    images = [number for number, row in enumerate(rows) if "pixel_values" in row.tensors]
    places = iter(images)
    on_device = (_copied(rows[number], model.device) for number in images)
    batches = join_rows(on_device, len(rows))
    for batch in batches if size is None else in_few_sizes(batches, size):
        embeds = encode(model, batch).cpu()
        if cache is not None:
            cache.add(batch.keys, embeds)
        for embed in embeds:
            place = next(places)
            encoded[place] = replace(rows[place], tensors={"caption_embeds": embed[None]}, keys=[])
    return encoded


def _copied(row: Batch, device: torch.device) -> Batch:
    """The row with its tensors on a device. The program does not wait for copies of pinned memory."""
    waits = device.type != "cuda"
    tensors = {name: tensor.to(device, non_blocking=not waits) for name, tensor in row.tensors.items()}
    return replace(row, tensors=tensors)


@torch.no_grad()
def encode(model: VLVModel, batch: Batch) -> torch.Tensor:
    """Caption embeddings `(B, Q, d_text)` of a batch of images, or those that the batch holds."""
    if "caption_embeds" in batch.tensors:
        return batch.tensors["caption_embeds"]
    return model.get_caption_embeds(batch.tensors["pixel_values"].to(model.device, model.dtype))
