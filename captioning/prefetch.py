"""Prefetches inputs in worker processes of a `DataLoader`, which hand over tensors in shared memory."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

from vlv.errors import UserError

CHUNK = 8
"""Most inputs that a worker reads at a time, and hands over together."""
CHUNK_BYTES = 16 * 2**20
"""Most bytes of tensors that are handed over together. A container often has 64 MiB of shared memory."""
ENDED = re.compile("DataLoader worker .*(is killed by signal|exited unexpectedly)")


def chunk_size(item_bytes: int) -> int:
    """How many inputs are handed over together whose tensors have so many bytes each: 1 to `CHUNK`."""
    return max(1, min(CHUNK, CHUNK_BYTES // item_bytes))


def prefetch_map(
    function: Callable[[Any], Any],
    inputs: Iterable[Any],
    num_workers: int,
    join: Callable[[list[Any]], Any] = list,
    chunk: int = CHUNK,
    pin_memory: bool = False,
) -> Iterator[Any]:
    """`join` of what a function returns for each `chunk` of the inputs, in their order.

    Inputs are taken only as far as they are prefetched. `worker_errors` explains what happens if a worker ends.

    Args:
        function: Can be pickled.
        num_workers: At least 1.
        join: Runs in the workers, too: they hand over few large tensors faster than many small ones.
        pin_memory: Whether a thread pins the tensors, and objects with `pin_memory`, for copies to a GPU.
    """
    yield from DataLoader(
        _MappedDataset(function),
        batch_sampler=_ChunkSampler(inputs, chunk),
        num_workers=num_workers,
        collate_fn=join,
        pin_memory=pin_memory,
    )


@contextmanager
def worker_errors() -> Iterator[None]:
    """Turns the error of a worker of `prefetch_map` that ends, which torch raises anywhere, into a `UserError`."""
    try:
        yield
    except RuntimeError as error:
        if not ENDED.search(str(error)):
            raise
        raise UserError(
            f"a process that reads images ended ({error}); it may lack memory, or space in /dev/shm (`docker run "
            "--shm-size`): pass a smaller --num-workers, or 0"
        ) from error


class _MappedDataset(Dataset):
    """What a function returns for the inputs that a sampler asks for: an input is its own index."""

    def __init__(self, function: Callable[[Any], Any]):
        self._function = function

    def __getitem__(self, item: Any) -> Any:
        return self._function(item)


class _ChunkSampler(Sampler):
    def __init__(self, inputs: Iterable[Any], chunk: int):
        self._inputs, self._chunk = inputs, chunk

    def __iter__(self) -> Iterator[list[Any]]:
        inputs = iter(self._inputs)
        return iter(lambda: list(islice(inputs, self._chunk)), [])
