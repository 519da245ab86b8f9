"""Runs the ways of a path in turns, and each alone for its memory, in processes that hold nothing else."""

import ctypes
import gc
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from .paths import Ways, open_path

WAYS = ("ours", "original", "floor")


def in_child(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of a function in a child process, which ends with all its memory.

    Raises:
        RuntimeError: If the child fails; its traceback stands on standard error.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # its threads race for torch's pool
        status = 1
        try:
            with os.fdopen(writer, "w") as file:
                json.dump(work(), file)
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("a measurement failed")
    return json.loads(text)


def measure_path(name: str, size: str, rounds: int, memory: bool = True) -> dict[str, Any]:
    """Times of the ways of a path, per image, and the peak memory of each.

    Args:
        rounds: Each way runs once in each, in another order. A first round is not counted.
    """
    found = in_child(lambda: _times(open_path(name, size), rounds))
    if memory:
        found["peak_mb"] = {way: in_child(lambda way=way: _peak(name, size, way))["mb"] for way in found["cpu"]}
    return found


def ratios(times: dict[str, list[float]], way: str, base: str = "ours") -> dict[str, float]:
    """Median, lowest and highest of the ratios `way / base` of the rounds."""
    each = [one / other for one, other in zip(times[way], times[base], strict=True)]
    return {"median": median(each), "lowest": min(each), "highest": max(each)}


def _times(ways: Ways, rounds: int) -> dict[str, Any]:
    try:
        functions = {way: function for way in WAYS if (function := getattr(ways, way)) is not None}
        difference = None if ways.difference is None else ways.difference()
        for function in functions.values():
            function()
        times: dict[str, dict[str, list[float]]] = {kind: {way: [] for way in functions} for kind in ("cpu", "wall")}
        for number in range(rounds):
            order = list(functions)
            for way in order[number % len(order) :] + order[: number % len(order)]:
                gc.collect()
                cpu, wall = time.process_time(), time.perf_counter()
                functions[way]()
                times["cpu"][way].append((time.process_time() - cpu) / ways.images)
                times["wall"][way].append((time.perf_counter() - wall) / ways.images)
        return times | {
            "difference": difference,
            "setting": ways.setting,
            "images": ways.images,
            "aim": ways.aim,
            "load": os.getloadavg()[0],
        }
    finally:
        for close in ways.close:
            close()


def _peak(name: str, size: str, way: str) -> dict[str, float]:
    """The most memory that a way has held, with its models, in MB."""
    ways = open_path(name, size)
    try:
        getattr(ways, way)()  # the optimiser has its state
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what building has freed goes back to the system
        Path("/proc/self/clear_refs").write_text("5")  # the highest value counts from here
        getattr(ways, way)()
        status = Path("/proc/self/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return {"mb": int(line.split()[1]) / 1024}
    finally:
        for close in ways.close:
            close()


def limit_threads() -> None:
    torch.set_num_threads(1)
