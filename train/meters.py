"""Means that a run logs: loss by timestep, speed, waiting for data. They stay on the device until they are read."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .data.collators import count_samples

QUARTILES = ("loss_t0_25", "loss_t25_50", "loss_t50_75", "loss_t75_100")
"""The mean error of images whose timestep lies in the first to fourth quarter of the schedule."""


class Means:
    """Means of named quantities over batches and processes.

    Args:
        names: Each has a sum and a count.
    """

    def __init__(self, names: Sequence[str], device: torch.device):
        self.names = tuple(names)
        self._sums = torch.zeros(2, len(self.names), device=device)

    def add(self, name: str, total: torch.Tensor | float, count: torch.Tensor | float) -> None:
        place = self.names.index(name)
        self._sums[0, place] += total
        self._sums[1, place] += count

    def add_by_timestep(self, losses: torch.Tensor, timesteps: torch.Tensor, num_timesteps: int) -> None:
        """Adds errors of images to the quartile of their timestep.

        Args:
            losses: `(B,)`.
            timesteps: `(B,)`, 0 to `num_timesteps - 1`.
        """
        first = self.names.index(QUARTILES[0])
        places = first + timesteps * len(QUARTILES) // num_timesteps
        self._sums[0].index_add_(0, places, losses.detach().to(self._sums.dtype))
        self._sums[1].index_add_(0, places, torch.ones_like(losses, dtype=self._sums.dtype))

    def read(self, accelerator: Any) -> dict[str, float]:
        """The means of all processes, which all have to call this, of what was added since the last call."""
        sums, counts = accelerator.reduce(self._sums, "sum").tolist()
        self._sums.zero_()
        return {name: s / n for name, s, n in zip(self.names, sums, counts, strict=True) if n}


class TimedIterator:
    """An iterator that adds up the seconds that its user waits for it, in `seconds`."""

    def __init__(self, iterator: Iterator[Any]):
        self.iterator, self.seconds = iterator, 0.0

    def __iter__(self) -> "TimedIterator":
        return self

    def __next__(self) -> Any:
        start = time.perf_counter()
        try:
            return next(self.iterator)
        finally:
            self.seconds += time.perf_counter() - start


class Speedometer:
    """Speed since the last log: images and tokens per second, the share of time spent waiting for data, utilisation.

    Args:
        device: Its memory is measured, if it is a GPU.
        flops: FLOPs of an image, and of a token, in a forward and backward pass; None to leave utilisation out.
        peak: FLOP/s of a device at most.
    """

    def __init__(self, device: torch.device, flops: tuple[float, float] | None = None, peak: float | None = None):
        self.device, self.flops, self.peak = device, flops, peak
        self._tokens = torch.zeros((), device=device)
        self.is_packed = False
        """Whether the padding of captions is left out, and does not count as work."""
        self.start()

    def start(self) -> None:
        """Forgets what was measured, as after a break."""
        self._images, self._padded_tokens, self._wait, self._since = 0, 0, 0.0, time.perf_counter()
        self._tokens.zero_()

    def add_wait(self, seconds: float) -> None:
        self._wait += seconds

    def pause(self, seconds: float) -> None:
        """Leaves out seconds in which nothing was trained."""
        self._since += seconds

    def add_batch(self, inputs: dict[str, Any]) -> None:
        """Counts a batch of this process. It does not wait for the device."""
        self._images += count_samples(inputs)
        labels = inputs.get("labels")
        if labels is not None:
            self._padded_tokens += labels.numel()
            self._tokens += (labels != -100).sum().to(self._tokens.device)

    def read(self, accelerator: Any) -> dict[str, float]:
        """The values of all processes together, which all have to call this, and starts anew."""
        seconds = max(time.perf_counter() - self._since, 1e-9)
        by_image, by_token = self.flops or (0.0, 0.0)
        memory = torch.cuda.max_memory_allocated(self.device) / 1e9 if self.device.type == "cuda" else 0.0
        computed = float(self._tokens) if self.is_packed else self._padded_tokens
        tera = (by_image * self._images + by_token * computed) / 1e12
        own = torch.tensor([self._images, 0.0, self._wait, seconds, tera, memory], device=self.device)
        own[1] = self._tokens
        rows = accelerator.gather(own[None]).tolist()  # of each process
        images, tokens, wait, total, tera, _ = (sum(column) for column in zip(*rows, strict=True))
        mean_seconds = total / len(rows)
        logs = {"images_per_second": round(images / mean_seconds, 2)}
        if tokens:
            logs["tokens_per_second"] = round(tokens / mean_seconds, 1)
        logs["data_wait_share"] = round(wait / total, 4)
        if self.flops is not None and self.peak:
            logs["model_flops_utilisation"] = round(tera * 1e12 / total / self.peak, 4)
        if self.device.type == "cuda":
            logs["peak_memory_gb"] = round(max(row[-1] for row in rows), 3)
        self.start()
        return logs
