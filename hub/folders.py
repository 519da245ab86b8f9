"""Writes output folders atomically."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder to write into. Its content moves to `path` at the end; a failure leaves nothing there.

    Raises:
        ValueError: If `path` is a file, or a folder that is not empty.
    """
    root = Path(path).resolve()
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ValueError(f"{path} is {'not empty' if root.is_dir() else 'a file'}; name a new folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root if root.is_dir() else root.parent, prefix=".vlv-") as temporary:
        work = Path(temporary) / "written"
        work.mkdir()
        yield work
        root.mkdir(exist_ok=True)
        for item in work.iterdir():
            shutil.move(item, root / item.name)
