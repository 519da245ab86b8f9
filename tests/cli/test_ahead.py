"""Processes that read images ahead give what one process gives, in its order."""

import itertools
import os
import signal

import pytest
import torch

from vlv.captioning.ahead import CHUNK, choose_num_workers, ended_readers, map_ahead
from vlv.captioning.batches import read_rows
from vlv.captioning.inputs import collect_images
from vlv.captioning.output import Summary
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


def test_few_images_are_read_by_one_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(4))
    assert [choose_num_workers(None, 10), choose_num_workers(None, 1000), choose_num_workers(2, 10)] == [0, 3, 2]
