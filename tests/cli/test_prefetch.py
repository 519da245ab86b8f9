"""Worker processes that prefetch images give what one process gives, in its order."""

import itertools
import os
import signal

import pytest
import torch

from vlv.captioning.batches import read_rows
from vlv.captioning.inputs import collect_images
from vlv.captioning.output import Summary
from vlv.captioning.prefetch import CHUNK, CHUNK_BYTES, chunk_size, prefetch_map, worker_errors
from vlv.cli.main import build_parser
from vlv.errors import UserError


def test_rows_and_failures_are_those_of_one_process(mixed_folder, image_processor):
    inputs = collect_images([str(mixed_folder)])
    assert len(inputs) > CHUNK - 1

    def read(num_workers: int):
        summary = Summary(len(inputs))
        rows = read_rows(inputs * 2, image_processor, summary, 16, True, num_workers=num_workers)
        return list(rows), summary.failed

    (alone, failed), (prefetched, failed_prefetched) = read(0), read(2)
    assert failed and failed_prefetched == failed
    assert [row.inputs for row in prefetched] == [row.inputs for row in alone]
    for row, expected in zip(prefetched, alone, strict=True):
        assert torch.equal(row.tensors["pixel_values"], expected.tensors["pixel_values"])
        assert row.originals[0].tobytes() == expected.originals[0].tobytes()


def test_inputs_are_taken_only_as_far_as_they_are_prefetched():
    numbers = itertools.count()
    results = prefetch_map(str, numbers, 1)
    assert next(results) == [str(number) for number in range(CHUNK)]
    assert next(numbers) <= 4 * CHUNK
    results.close()


def end_at_five(number: int) -> int:
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_process_that_ends_is_explained():
    with pytest.raises(UserError, match=r"a process that reads images ended .*--num-workers"), worker_errors():
        list(prefetch_map(end_at_five, range(10), 1))


def fail(number: int) -> int:
    raise RuntimeError(f"number {number} is not a number")


def test_an_error_of_the_function_is_not_lack_of_memory():
    with pytest.raises(RuntimeError, match="number 0 is not"), worker_errors():
        list(prefetch_map(fail, range(10), 1))


def test_large_images_are_handed_over_in_small_chunks():
    assert [chunk_size(3 * side**2 * 4) for side in (48, 384, 768, 4096)] == [CHUNK, CHUNK, 2, 1]
    assert CHUNK_BYTES >= 2 * 3 * 768**2 * 4


def test_images_are_read_in_one_process_unless_asked():
    assert build_parser().parse_args(["caption", "photos"]).num_workers == 0
