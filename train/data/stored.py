"""Arrays that are computed from data files once, and kept in a cache folder for later runs."""

import hashlib
import os
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock
from transformers.utils import logging

from vlv.files import write_atomically

from .captions import UNKNOWN

logger = logging.get_logger(__name__)

VERSION = 2
MIN_SECONDS = 1.0
"""The arrays of a source that are computed in less time are not stored."""
SECONDS_BETWEEN_MESSAGES = 10.0
Arrays = dict[str, np.ndarray]


def cache_folder() -> Path:
    """`$VLV_DATA_CACHE`, or `vlv/data` in the cache folder of the Hugging Face libraries."""
    return Path(os.environ.get("VLV_DATA_CACHE") or Path(constants.HF_HOME) / "vlv" / "data")


def stored_arrays(
    files: Sequence[str],
    what: str,
    compute: Callable[[int], Arrays],
    is_complete: Callable[[Arrays], bool] = lambda arrays: True,
) -> list[Arrays]:
    """The arrays that `compute(number)` returns for each file of a source, from the cache if they are there.

    A file of another size or time of change is computed anew. Of several processes one computes while the others wait.
    Says how far it is every ten seconds. A cache that cannot be read or written does no harm.

    Args:
        what: What is computed; part of the name in the cache.
        is_complete: Whether arrays may be stored.
    """
    places = [_place(file, what) for file in files]
    found = [_load(place) for place in places]
    if all(arrays is not None for arrays in found):
        return [arrays for arrays in found if arrays is not None]
    with _one_process(places):
        complete: list[Arrays] = []
        not_stored: list[int] = []
        seconds, last_message = 0.0, time.perf_counter()
        for number, place in enumerate(places):
            arrays = found[number]
            if arrays is None:
                arrays = _load(place)  # another process may have computed it meanwhile
            if arrays is None:
                since = time.perf_counter()
                arrays = compute(number)
                seconds += time.perf_counter() - since
                if is_complete(arrays):
                    not_stored.append(number)
            complete.append(arrays)
            if seconds >= MIN_SECONDS:
                for other in not_stored:
                    _save(places[other], complete[other])
                not_stored.clear()
            if time.perf_counter() - last_message >= SECONDS_BETWEEN_MESSAGES:
                last_message = time.perf_counter()
                logger.warning(f"reading the {what.split()[0]} of {files[0]}, ...: {number + 1} of {len(files)} files")
    return complete


def count_by_file(files: Sequence[str], what: str, count: Callable[[int], list[int]]) -> np.ndarray:
    """`(rows,)`: numbers of captions in the rows of files, from the cache if they are there.

    Args:
        count: Returns the numbers in the file of a number, `UNKNOWN` where a row cannot be read. Such a row counts as
            one caption: the collator finds out, and counts the row as unreadable. Its file's counts are not stored.
    """

    def compute(number: int) -> Arrays:
        return {"counts": np.array(count(number), dtype=np.int32)}

    counts = stored_arrays(files, what, compute, lambda arrays: not (arrays["counts"] == UNKNOWN).any())
    together = np.concatenate([arrays["counts"] for arrays in counts]) if counts else np.zeros(0, np.int32)
    return np.where(together == UNKNOWN, 1, together)


def _place(file: str, what: str) -> Path:
    status = os.stat(file)
    key = repr((VERSION, what, os.path.realpath(file), status.st_size, status.st_mtime_ns))
    return cache_folder() / f"{_hash(key)}.npz"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


@contextmanager
def _one_process(places: Sequence[Path]) -> Iterator[None]:
    """Waits for another process that computes the same; does nothing where the cache cannot be written.

    There are 16 locks, so that the cache does not fill up with them.
    """
    with ExitStack() as stack:
        try:
            cache_folder().mkdir(parents=True, exist_ok=True)
            stack.enter_context(WeakFileLock(cache_folder() / f"{_hash(repr(places))[0]}.lock"))
        except OSError:
            pass
        yield


def _load(place: Path) -> Arrays | None:
    try:
        with np.load(place, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):  # absent, or cut off
        return None


def _save(place: Path, arrays: Arrays) -> None:
    def write(path: Path) -> None:
        with path.open("wb") as target:
            np.savez_compressed(target, **arrays)  # type: ignore[arg-type]

    try:
        write_atomically(place, write)
    except OSError:
        pass
