"""Captions the images of shards: what a process needs to know of a run, and what it does with a shard."""

import ctypes
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch

from vlv import hub

from .acceleration import accelerate
from .captioner import Captioner, CaptionSettings
from .choices import TIME_LIMIT
from .encoding import ENCODER_BATCH_SIZE, open_embeddings_cache, read_encoded_batches
from .inputs import Input
from .output import Summary
from .prefetch import worker_errors
from .shards import ShardFolder
from .texts import CaptionEditor

SECONDS_BETWEEN_TRIMS = 1.0
PACKAGES = ("vlv", "torch", "transformers", "pillow")


@dataclass(frozen=True)
class ShardJob:
    """How shards are captioned. It can be sent to other processes, which need the same folders.

    Args:
        model: A folder, or a repo id.
        dtype: Name of the precision, such as `bfloat16`.
        device: Such as `cuda:1`.
        settings: Of the captions.
        editor: Edits them.
        batch_size: Captions that are written together.
        encoder_batch_size: Images in a pass of the encoder.
        num_workers: Processes that read images; 0 reads them in the process that captions.
        embeddings_cache: Folder of `open_embeddings_cache`.
        static_cache, compiled: As of `accelerate`.
        url_timeout: Seconds that a download may take.
    """

    model: str
    dtype: str
    device: str
    settings: CaptionSettings
    editor: CaptionEditor = field(default_factory=CaptionEditor)
    batch_size: int = 8
    encoder_batch_size: int = ENCODER_BATCH_SIZE
    num_workers: int = 0
    embeddings_cache: str | None = None
    static_cache: bool = False
    compiled: bool = False
    url_timeout: float = TIME_LIMIT

    def load(self) -> "ShardCaptioner":
        """Loads the model. Raises `OSError` and `ValueError` as `hub.load_captioner` does."""
        return ShardCaptioner(self)


def return_freed_memory() -> None:
    """Gives the system what tensors have freed, in some milliseconds. glibc keeps it in pieces, more and more."""
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


class ShardCaptioner:
    """A model that captions shards.

    Args:
        captioner: Writes the captions; by default the language model of the job's model.
    """

    def __init__(self, job: ShardJob, captioner: Captioner | None = None):
        self.job, self.captioner = job, captioner or load_captioner(job)
        processor = self.captioner.processor.image_processor
        self._cache = open_embeddings_cache(job.embeddings_cache, self._encoder, processor)

    @property
    def _encoder(self) -> Any:
        return self.captioner.model.model

    def caption(self, shards: ShardFolder, index: int) -> dict[str, int] | None:
        """Captions the images of a shard.

        Returns:
            The numbers of images that are `captioned` and `failed`; None if the shard is done, or another process
            writes it.

        Raises:
            UserError: If a file of the shard cannot be read at all.
            OSError: If the shard cannot be written. It is then absent.
        """
        with shards.claim(index) as writer:
            if writer is None:
                return None
            since, inputs = time.perf_counter(), shards.inputs(index, self.job.url_timeout)
            summary = Summary(len(inputs))
            freed = since
            for rows in self.caption_inputs(inputs, summary):
                writer.add(rows)
                if (now := time.perf_counter()) - freed > SECONDS_BETWEEN_TRIMS:
                    return_freed_memory()
                    freed = now
            writer.add([{"name": name, "error": reason} for name, reason in summary.failed.items()])
            counts = {"captioned": summary.done, "failed": len(summary.failed)}
            notes = self.job.editor.notes()
            self.job.editor.counts.clear()
            writer.finish(
                {
                    **shards.metadata(index),
                    "counts": counts,
                    "notes": notes,
                    "seconds": round(time.perf_counter() - since, 3),
                    **self.environment(),
                }
            )
        summary.say(*notes)
        summary.close("captioned", str(shards.path(index)))
        return counts

    def caption_inputs(self, inputs: list[Input], summary: Summary) -> Iterator[list[dict[str, Any]]]:
        """Lines of the inputs that can be read, batch by batch. `summary` counts them, and names the others."""
        with worker_errors():
            for batch in self._batches(inputs, summary):
                captions = [self.job.editor.edit(own) for own in self.captioner.caption(batch)]
                yield [to_row(item, own) for item, own in zip(batch.inputs, captions, strict=True)]
                summary.done += len(batch.inputs)
                summary.advance(len(batch.inputs))

    def environment(self) -> dict[str, Any]:
        """What a record says of the machine: device, and versions of packages."""
        return {
            "device": str(self.captioner.model.device),
            "versions": {name: version(name) for name in PACKAGES},
        }

    def _batches(self, inputs: list[Input], summary: Summary) -> Any:
        job = self.job
        return read_encoded_batches(
            *(inputs, self._encoder, self.captioner.processor.image_processor, job.batch_size, summary),
            identify=job.settings.is_sampled,  # the seed of samples depends on the image
            encoder_batch_size=job.encoder_batch_size,
            cache=self._cache,
            num_workers=job.num_workers,
            few_sizes=self.captioner.model.device.type == "cpu",
        )


def load_captioner(job: ShardJob) -> Captioner:
    """The model of a job with its settings. Raises as `hub.load_captioner` and `accelerate`."""
    model, processor = hub.load_captioner(job.model, dtype=getattr(torch, job.dtype), device=job.device)
    acceleration = accelerate(model, job.static_cache, job.compiled)
    return Captioner(model, processor, job.settings, acceleration=acceleration)


def to_row(item: Input, captions: list[str]) -> dict[str, Any]:
    """The line of an image: `caption`, or `captions` if there are several."""
    return {"name": item.name, **({"caption": captions[0]} if len(captions) == 1 else {"captions": captions})}
