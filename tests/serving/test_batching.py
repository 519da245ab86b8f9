"""Jobs of concurrent requests, computed by one thread."""

import asyncio
import threading

import pytest

from vlv.serving.batching import Batcher, Closed, Failed, Full, Job, Result


class Computation:
    """Answers each job with its payload, and keeps the batches. `gate` holds the first batch."""

    def __init__(self, gate: threading.Event | None = None, bad: object = None):
        self.batches: list[list] = []
        self.gate, self.bad = gate, bad
        self.begun = threading.Event()

    def __call__(self, jobs) -> None:
        self.begun.set()
        if self.gate is not None:
            self.gate.wait()
        payloads = [job.payload for job in jobs]
        if self.bad in payloads:
            raise ValueError("a bad job")
        self.batches.append(payloads)
        for job in jobs:
            job.send(Result(job.payload))


async def answers(batcher: Batcher, jobs: list[Job]) -> list:
    for job in jobs:
        batcher.submit(job)
    return [await job.events.get() for job in jobs]


def test_jobs_that_wait_are_computed_together_by_their_keys_in_order():
    gate = threading.Event()
    compute = Computation(gate)
    batcher = Batcher(compute, max_rows=4, max_waiting=10, max_wait=0)

    async def run():
        first = Job("a", 1, "first")
        batcher.submit(first)
        await asyncio.to_thread(compute.begun.wait)
        jobs = [Job("a", 2, 1), Job("b", 1, 2), Job("a", 2, 3), Job("a", 1, 4)]
        for job in jobs:
            batcher.submit(job)
        gate.set()
        return [await job.events.get() for job in [first, *jobs]]

    assert asyncio.run(run()) == [Result("first"), Result(1), Result(2), Result(3), Result(4)]
    batcher.close()
    assert compute.batches == [["first"], [1, 3], [2], [4]]


def test_a_job_that_fails_does_not_fail_those_beside_it():
    batcher = Batcher(Computation(bad="bad"), max_rows=4, max_waiting=10, max_wait=0.2)

    async def run():
        return await answers(batcher, [Job("a", 1, 1), Job("a", 1, "bad"), Job("a", 1, 2)])

    first, bad, last = asyncio.run(run())
    assert (first, last) == (Result(1), Result(2))
    assert isinstance(bad, Failed) and str(bad.error) == "a bad job"


def test_no_more_jobs_wait_than_may_wait_and_cancelled_ones_do_not_count():
    gate = threading.Event()
    compute = Computation(gate)
    batcher = Batcher(compute, max_rows=1, max_waiting=2, max_wait=0)

    async def run():
        batcher.submit(Job("a", 1, 0))
        await asyncio.to_thread(compute.begun.wait)
        waiting = [Job("a", 1, 1), Job("a", 1, 2)]
        for job in waiting:
            batcher.submit(job)
        with pytest.raises(Full):
            batcher.submit(Job("a", 1, 3))
        assert batcher.waiting == 2
        waiting[0].cancel()
        assert batcher.waiting == 1
        last = Job("a", 1, 4)
        batcher.submit(last)
        gate.set()
        await last.events.get()

    asyncio.run(run())
    assert compute.batches == [[0], [2], [4]]


def test_closing_computes_what_waits_and_takes_nothing_more():
    gate = threading.Event()
    compute = Computation(gate)
    batcher = Batcher(compute, max_rows=1, max_waiting=9, max_wait=0)

    async def run():
        for number in range(3):
            batcher.submit(Job("a", 1, number))
        gate.set()
        batcher.close()
        with pytest.raises(Closed):
            batcher.submit(Job("a", 1, 3))

    asyncio.run(run())
    assert compute.batches == [[0], [1], [2]]
