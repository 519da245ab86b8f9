"""Files on disk: reads and writes JSON, reads headers of weights. Errors name the file."""

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

DTYPES = {  # names in safetensors and in torch
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "U8": "uint8",
    "BOOL": "bool",
}
Header = dict[str, tuple[tuple[int, ...], str]]  # shape and dtype (such as "float16") of each weight, by name


def read_json(path: str | os.PathLike, *needed: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        needed: Names that the object must have, with a value that is not null.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a JSON object, or lacks one of `needed`; the message names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path.name} in {path.parent}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{path} is damaged, or not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a JSON object; is it the right file?")
    missing = [name for name in needed if content.get(name) is None]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; is it complete, and the right file?")
    return content


def write_atomically(path: Path, write: Callable[[Path], object], replaces: bool = True) -> None:
    """Calls `write` with a temporary file beside `path`, then renames it: no reader sees an incomplete file.

    Of a link, the file that it leads to is replaced. An existing file keeps its permissions.

    Args:
        replaces: Whether an existing file is replaced. It is `FileExistsError` otherwise, also if the file appears
            during the write.

    Raises:
        OSError: If the file cannot be written; its `filename` is `path`.
    """
    with errors_naming(path):
        path = Path(os.path.realpath(path)) if replaces else path
        path.parent.mkdir(parents=True, exist_ok=True)
        # The name of the temporary file is short, whatever the length of the name of `path`.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=path.suffix[:10])
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            if path.exists():
                shutil.copymode(path, temporary)
            else:
                set_default_permissions(temporary)
            if replaces:
                temporary.replace(path)
            else:
                _move_to_new(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _move_to_new(temporary: Path, path: Path) -> None:
    """Gives a file a name that no file has. Raises `FileExistsError` if one has it."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        temporary.replace(path)
    else:
        temporary.unlink()


def nearest_existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = Path(os.path.abspath(path))
    while not os.path.lexists(path):
        path = path.parent
    return path


def require_space(path: Path, needed: int) -> None:
    """Raises `OSError` if the disk of a file or folder, which may have to be created, has fewer bytes than needed."""
    free = shutil.disk_usage(nearest_existing(path)).free
    if free < needed:
        reason = f"it needs {needed / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB free; name another disk"
        raise OSError(errno.ENOSPC, reason, str(path))


@contextmanager
def errors_naming(path: Path) -> Iterator[None]:
    """Errors of writing a file name it. Libraries' errors of a full disk name no file, or a temporary one."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    except SafetensorError as error:  # such as "I/O error: No space left on device (os error 28)"
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def to_json(value: Any, indent: int | None = 2) -> bytes:
    """JSON as UTF-8. Strings that are not valid Unicode (file names) are escaped."""
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent).encode("ascii")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes JSON as indented UTF-8, atomically. Strings that are not valid Unicode (file names) are escaped."""
    data = to_json(value) + b"\n"
    write_atomically(Path(path), lambda temporary: temporary.write_bytes(data))


def set_default_permissions(*paths: Path) -> None:
    """Gives files the default permissions. safetensors and tempfile create files that only their owner can read."""
    mask = os.umask(0)
    os.umask(mask)
    for path in paths:
        path.chmod(0o666 & ~mask)


def read_header(path: Path) -> Header:
    """Shapes and dtypes of the weights in a safetensors file. The weights are not read.

    Raises:
        ValueError: If it is damaged; the message names it.
    """
    try:
        with safe_open(path, "pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (not a mapping)
            stored = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
            return {name: (shape, DTYPES.get(dtype, dtype)) for name, (shape, dtype) in stored.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or not a safetensors file: {error}") from error


def refuse_damaged(folder: Path) -> None:
    """Raises `ValueError` with the name of the first unreadable safetensors or JSON file of a folder, if there is one.

    For errors of libraries that do not name the file.
    """
    for path in sorted(folder.glob("*.safetensors")):
        read_header(path)
    for path in sorted(folder.glob("*.json")):
        read_json(path)


def is_variant(name: str) -> bool:
    """Whether a weight file is a half-precision variant, such as `model.fp16.safetensors`."""
    return ".fp16" in name


def stored_dtype(folder: Path) -> torch.dtype:
    """Precision of the largest tensor in the first safetensors file of a folder; float32 if there is none.

    Raises:
        ValueError: If torch has no such precision, or the file is damaged.
    """
    for path in sorted(p for p in folder.glob("*.safetensors") if not is_variant(p.name)):
        _, dtype = max(read_header(path).values(), key=lambda weight: prod(weight[0]), default=((), "float32"))
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"{path} is stored in {dtype}, which is not supported; convert it to float16 or float32")
        return getattr(torch, dtype)
    return torch.float32
