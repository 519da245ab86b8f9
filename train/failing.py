"""Ends all processes of a run when one of them fails, so that the others do not wait for it at a collective."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed

KEY = "vlv_failure"
SECONDS = 1.0
"""Between two looks of a process at whether another has failed."""
GRACE = 4.0
"""Seconds that the others give the failed process to print what is wrong and to end first, as launchers report it."""
EXIT_CODE = 2


@contextmanager
def end_with_others(program: str) -> Iterator[Callable[[str], str | None]]:
    """Ends this process with one line and `EXIT_CODE` when another process of the run announces a failure.

    The processes tell each other through the key-value store of `torch.distributed`, which works while the main thread
    waits for a collective. A process that is killed announces nothing: its launcher ends the others.

    Yields:
        A function to call before this process ends with an error. It announces a message; if another process has
        announced one before, it returns what this process has to print in its place. It ends the process if that has
        been printed already.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        yield lambda message: None
        return
    store = distributed.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined] # a connection of its own
    rank, size = distributed.get_rank(), distributed.get_world_size()
    stopped, printed = threading.Event(), threading.Event()
    watch = threading.Thread(target=_watch, args=(store, program, stopped, printed), daemon=True)
    watch.start()

    def announce(message: str) -> str | None:
        stopped.set()
        watch.join(SECONDS)
        if printed.is_set():
            raise SystemExit(EXIT_CODE)
        try:
            if found := _failure(store):
                return found
            store.set(KEY, f"process {rank} (of {size}, from 0 on) has failed: {message}")
        except RuntimeError:  # the store has ended with the process that holds it
            return None
        if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            time.sleep(2 * SECONDS)  # the store ends with this process: the others have to read it first
        return None

    try:
        yield announce
    finally:
        stopped.set()
        watch.join(SECONDS)


def _failure(store: Any) -> str | None:
    """What a process prints when another has failed."""
    return f"{store.get(KEY).decode()}; this process ends, too" if store.check([KEY]) else None


def _watch(store: Any, program: str, stopped: threading.Event, printed: threading.Event) -> None:
    while not stopped.wait(SECONDS):
        try:
            found = _failure(store)
        except RuntimeError:  # the store has ended with the process that holds it
            return
        if found:
            print(f"{program}: {found}", file=sys.stderr, flush=True)
            printed.set()
            if not stopped.wait(GRACE):
                os._exit(EXIT_CODE)  # the main thread waits in a library
            return
