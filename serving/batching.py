"""Jobs of concurrent requests, computed together by one thread."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Delta:
    """A further part of the text of choice `index`."""

    index: int
    text: str


@dataclass(frozen=True)
class Finished:
    """Choice `index` has ended, for `reason`, with `tokens` new tokens, and its whole text is `text`."""

    index: int
    reason: str
    text: str
    tokens: int


@dataclass(frozen=True)
class Result:
    """The value of a job without choices."""

    value: Any


@dataclass(frozen=True)
class Failed:
    """The job ended with an error."""

    error: BaseException


class Full(Exception):
    """As many jobs wait as may wait."""


class Closed(Exception):
    """The server stops, and takes no new jobs."""


class Job:
    """Work of one request. It is made in an event loop, which reads `events`.

    Args:
        key: Jobs of equal keys can be computed together.
        rows: How much of a batch it takes.
        payload: What the computation reads.
    """

    def __init__(self, key: Hashable, rows: int, payload: Any):
        self.key, self.rows, self.payload = key, rows, payload
        self.events: asyncio.Queue[Any] = asyncio.Queue()
        self.has_sent = False
        self._loop = asyncio.get_running_loop()
        self._cancelled = threading.Event()

    def send(self, event: Any) -> None:
        """Passes an event to the request, from any thread."""
        self.has_sent = True
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)

    def cancel(self) -> None:
        """Says that nobody waits for the job any more."""
        self._cancelled.set()

    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()


class Batcher:
    """A thread that computes jobs in the order of their arrival, those of equal keys together.

    A batch ends before the next one begins. If a batch of several jobs fails before one of them has sent anything,
    each is computed alone, so that one request cannot fail the others.

    Args:
        compute: Computes jobs of equal keys; it sends each job its events.
        max_rows: Most rows of a batch. A job has at most as many.
        max_waiting: Most jobs that wait.
        max_wait: Longest time in seconds that a first job waits for others.
    """

    def __init__(
        self, compute: Callable[[Sequence[Job]], None], max_rows: int, max_waiting: int, max_wait: float = 0.005
    ):
        self.compute, self.max_rows, self.max_waiting, self.max_wait = compute, max_rows, max_waiting, max_wait
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="vlv-batcher", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Puts a job into the queue.

        Raises:
            Full: If `max_waiting` jobs wait.
            Closed: After `close`.
        """
        with self._changed:
            if self._closing:
                raise Closed
            self._drop_cancelled()
            if len(self._waiting) >= self.max_waiting:
                raise Full
            self._waiting.append(job)
            self._changed.notify_all()

    @property
    def waiting(self) -> int:
        """Number of jobs that no batch has taken and that somebody waits for."""
        with self._changed:
            return sum(not job.is_cancelled() for job in self._waiting)

    def close(self) -> None:
        """Computes what waits, then ends the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while (batch := self._next_batch()) or not self._closing:
            if batch:
                self._compute(batch)

    def _next_batch(self) -> list[Job]:
        """Jobs of one key; none at the end."""
        with self._changed:
            while not (live := self._drop_cancelled()) and not self._closing:
                self._changed.wait()
            until = time.monotonic() + self.max_wait
            while live and not self._closing and sum(job.rows for job in self._waiting) < self.max_rows:
                if (left := until - time.monotonic()) <= 0:
                    break
                self._changed.wait(left)
                live = self._drop_cancelled()
            batch: list[Job] = []
            rows = 0
            for job in list(self._waiting):
                if batch and (job.key != batch[0].key or rows + job.rows > self.max_rows):
                    continue
                batch.append(job)
                rows += job.rows
                self._waiting.remove(job)
            return batch

    def _drop_cancelled(self) -> bool:
        """Whether a job waits that somebody still waits for."""
        self._waiting = deque(job for job in self._waiting if not job.is_cancelled())
        return bool(self._waiting)

    def _compute(self, batch: list[Job]) -> None:
        try:
            self.compute(batch)
        except Exception as error:
            if len(batch) == 1 or any(job.has_sent for job in batch):
                for job in batch:
                    job.send(Failed(error))
                return
            for job in batch:
                self._compute([job])
