"""Reads inputs ahead, in processes of a `DataLoader` that hand over tensors in shared memory."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

from vlv.errors import UserError

CHUNK = 8
"""Inputs that a process reads at a time, and hands over together."""
MAX_WORKERS = 8
WORTH_WORKERS = 256
"""Of fewer inputs, a process reads them as fast as it starts others."""


def choose_num_workers(given: int | None, inputs: int | None) -> int:
    """The processes that read images: those asked for, or one for each further core and at most `MAX_WORKERS`.

    Args:
        inputs: Their number; None if there are so many that it is not known yet.
    """
    if given is not None:
        return given
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores - 1, MAX_WORKERS) if inputs is None or inputs >= WORTH_WORKERS else 0


def map_ahead(
    function: Callable[[Any], Any],
    inputs: Iterable[Any],
    num_workers: int,
    join: Callable[[list[Any]], Any] = list,
) -> Iterator[Any]:
    """`join` of what a function returns for each `CHUNK` of the inputs, in their order.

    Inputs are taken only as far as is read ahead. `ended_readers` explains what happens if a process ends.

    Args:
        function: Can be pickled.
        num_workers: At least 1.
        join: Runs in the processes, too: they hand over few large tensors faster than many small ones.
    """
    yield from DataLoader(_Mapped(function), batch_sampler=_Chunks(inputs), num_workers=num_workers, collate_fn=join)


@contextmanager
def ended_readers() -> Iterator[None]:
    """Turns the error of a process of `map_ahead` that ends, which torch raises anywhere, into a `UserError`."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"a process that reads images ended ({error}); it may lack memory, or space in /dev/shm: pass a smaller "
            "--num-workers, or 0"
        ) from error


class _Mapped(Dataset):
    """What a function returns for the inputs that a sampler asks for: an input is its own index."""

    def __init__(self, function: Callable[[Any], Any]):
        self._function = function

    def __getitem__(self, item: Any) -> Any:
        return self._function(item)


class _Chunks(Sampler):
    def __init__(self, inputs: Iterable[Any]):
        self._inputs = inputs

    def __iter__(self) -> Iterator[list[Any]]:
        inputs = iter(self._inputs)
        return iter(lambda: list(islice(inputs, CHUNK)), [])
