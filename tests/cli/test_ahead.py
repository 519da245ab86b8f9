"""Processes that read images ahead give what one process gives, in its order."""

import itertools
import os
import signal

import pytest
import torch

from vlv.captioning.ahead import CHUNK, CHUNK_BYTES, chunk_of, ended_readers, map_ahead
from vlv.captioning.batches import read_rows
from vlv.captioning.inputs import collect_images
from vlv.captioning.output import Summary
from vlv.cli.main import build_parser
from vlv.errors import UserError


def test_rows_and_failures_are_those_of_one_process(mixed_folder, image_processor):
    inputs = collect_images([str(mixed_folder)])
    assert len(inputs) > CHUNK - 1

    def read(num_workers: int):
        summary = Summary(len(inputs))
        rows = read_rows(inputs * 2, image_processor, summary, 16, True, num_workers=num_workers)
        return list(rows), summary.failed

    (alone, failed), (ahead, failed_ahead) = read(0), read(2)
    assert failed and failed_ahead == failed
    assert [row.inputs for row in ahead] == [row.inputs for row in alone]
    for row, expected in zip(ahead, alone, strict=True):
        assert torch.equal(row.tensors["pixel_values"], expected.tensors["pixel_values"])
        assert row.originals[0].tobytes() == expected.originals[0].tobytes()


def test_inputs_are_taken_as_far_as_is_read_ahead():
    numbers = itertools.count()
    results = map_ahead(str, numbers, 1)
    assert next(results) == [str(number) for number in range(CHUNK)]
    assert next(numbers) <= 4 * CHUNK
    results.close()


def end_at_five(number: int) -> int:
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_process_that_ends_is_explained():
    with pytest.raises(UserError, match=r"a process that reads images ended .*--num-workers"), ended_readers():
        list(map_ahead(end_at_five, range(10), 1))


def fail(number: int) -> int:
    raise RuntimeError(f"number {number} is not a number")


def test_an_error_of_the_function_is_not_lack_of_memory():
    with pytest.raises(RuntimeError, match="number 0 is not"), ended_readers():
        list(map_ahead(fail, range(10), 1))


def test_large_images_are_handed_over_in_small_chunks():
    assert [chunk_of(3 * side**2 * 4) for side in (48, 384, 768, 4096)] == [CHUNK, CHUNK, 2, 1]
    assert CHUNK_BYTES >= 2 * 3 * 768**2 * 4


def test_images_are_read_in_one_process_unless_asked():
    assert build_parser().parse_args(["caption", "photos"]).num_workers == 0
