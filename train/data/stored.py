"""Arrays that are computed from a data file once, and kept in a cache folder for later runs."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import constants

from vlv.files import write_atomically

VERSION = 1
MIN_SECONDS = 1.0
"""What is computed in less time is not stored."""
Arrays = dict[str, np.ndarray]


def cache_folder() -> Path:
    """`$VLV_DATA_CACHE`, or `vlv/data` in the cache folder of the Hugging Face libraries."""
    return Path(os.environ.get("VLV_DATA_CACHE") or Path(constants.HF_HOME) / "vlv" / "data")


def stored_arrays(file: str | os.PathLike, what: str, compute: Callable[..., Arrays], *args: Any) -> Arrays:
    """The arrays that `compute(*args)` returns for a file, from the cache if they are there.

    A file of another size or time of change is computed anew. A cache that cannot be read or written does no harm.
    """
    status = os.stat(file)
    key = repr((VERSION, what, os.path.realpath(file), status.st_size, status.st_mtime_ns))
    stored = cache_folder() / f"{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.npz"
    try:
        with np.load(stored, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError):  # absent, or cut off
        pass
    except Exception as error:  # zipfile.BadZipFile, and zlib's errors
        if type(error).__module__ not in ("zipfile", "zlib"):
            raise
    since = time.perf_counter()
    arrays = compute(*args)
    if time.perf_counter() - since < MIN_SECONDS:
        return arrays

    def write(path: Path) -> None:
        with path.open("wb") as target:
            np.savez_compressed(target, **arrays)  # type: ignore[arg-type]

    try:
        write_atomically(stored, write)
    except OSError:
        pass
    return arrays
