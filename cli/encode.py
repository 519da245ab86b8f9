"""`vlv encode`: caption embeddings of images."""

import argparse
import time
from math import prod

import torch
from safetensors.torch import save_file

from vlv import hub
from vlv.captioning.encoding import open_embeddings_cache, read_encoded_batches
from vlv.captioning.inputs import collect_images
from vlv.captioning.output import Summary, output_path, refuse_existing
from vlv.errors import UserError
from vlv.files import require_space, write_atomically

from .models import choose_device, choose_model, loading, precision

MAX_WRITING_SHARE = 20  # rewriting the file takes at most 1/20 of the time


def run(arguments: argparse.Namespace) -> int:
    output = output_path(arguments.output, ".safetensors")
    if not arguments.overwrite:
        refuse_existing(output, "--output")
    inputs = collect_images(arguments.paths)
    source = choose_model(arguments)
    with loading(source):
        folder = hub.resolve(source, revision=arguments.revision, allow_patterns=["*.json"])
        two_encoders = hub.has_two_encoders(folder)
        config = hub.read_config(folder / "encoder" if (folder / "encoder" / "config.json").is_file() else folder)
        if two_encoders and arguments.use is None:
            raise UserError(
                f"{source} has two encoders, one for captions and one for reconstructions, and the embeddings of one "
                "do not serve the other: pass --for caption or --for reconstruct"
            )
    size = prod(hub.caption_embeds_shape(config))  # 0: not known
    require_space(output, len(inputs) * size * precision(arguments).itemsize)
    with loading(source):
        model, image_processor = hub.load_encoder(
            source,
            revision=arguments.revision,
            dtype=precision(arguments),
            device=choose_device(arguments),
            for_captions=arguments.use == "caption",
        )
    cache = open_embeddings_cache(arguments.embeddings_cache, model, image_processor)
    metadata = {"model": tensor_name(source)} | ({"for": arguments.use} if two_encoders else {})
    summary = Summary(len(inputs))
    embeddings: dict[str, torch.Tensor] = {}
    written, next_write = 0, 0.0

    def write() -> None:
        write_atomically(output, lambda path: save_file(embeddings, path, metadata=metadata))

    try:
        size = arguments.batch_size
        for batch in read_encoded_batches(
            inputs, model, image_processor, size, summary, encoder_batch_size=size, cache=cache
        ):
            rows = batch.tensors["caption_embeds"]
            for name, row in zip(batch.names, rows, strict=True):
                embeddings[tensor_name(name)] = row.contiguous().clone()
            summary.done += len(rows)
            summary.advance(len(rows))
            if time.monotonic() >= next_write:
                start = time.monotonic()
                write()
                end = time.monotonic()
                written, next_write = summary.done, end + MAX_WRITING_SHARE * (end - start)
    finally:  # an interrupted run keeps the embeddings that are done
        if summary.done > written:
            write()
    return summary.close("encoded", str(output))


def tensor_name(name: str) -> str:
    """A name that safetensors accepts: valid Unicode, and not the one that the format keeps for its metadata."""
    name = name.encode("utf-8", "backslashreplace").decode("utf-8")
    return f"./{name}" if name == "__metadata__" else name
