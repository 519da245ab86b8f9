"""Values and inputs of a command: numbers, images in files and folders, embeddings in a file."""

import hashlib
import os
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from vlv.errors import UserError
from vlv.image_files import walk_images


@dataclass(frozen=True)
class Input:
    """An image or caption embeddings, with the name that the output uses.

    Args:
        path: The image file, or the file that holds the image or the embeddings.
        problem: Why the image cannot be read, where that is known already.
        identity: See `identify`.
        member: What the image is called in a file that holds many.
        read: Reads an image that is not a file of its own: bytes, an array, or the path of a file. Raises `OSError` or
            `ValueError`.
        remote: The URL, or the place in a data set of the Hub, of an image that no file holds.
        content: What `read` has returned.
        version: Tells the version of a data set that holds the image from others; "" if only the image itself does,
            None for an image in a file of `path`.
    """

    name: str
    path: Path
    embeds: torch.Tensor | None = None  # (Q, d_text)
    problem: str | None = None
    identity: Mapping[str, Any] | None = None
    member: str | None = None
    read: Callable[[], Any] | None = None
    remote: str | None = None
    content: Any = None
    version: str | None = None

    @property
    def source(self) -> str:
        """The absolute path, with the name for embeddings and members, of which a file holds many; or `remote`."""
        if self.remote is not None:
            return self.remote
        member = self.name if self.embeds is not None else self.member
        return os.path.abspath(self.path) + ("" if member is None else f"#{member}")

    @property
    def is_file(self) -> bool:
        """Whether the image is a file of its own."""
        return self.embeds is None and self.member is None and self.remote is None

    @property
    def image(self) -> Any:
        """What the image processor loads."""
        return self.path if self.content is None else self.content

    def open(self) -> "Input":
        """The input with its `content`, if the image is not a file of its own. Raises `OSError` or `ValueError`."""
        return self if self.read is None or self.content is not None else replace(self, content=self.read())

    def status(self) -> tuple[int, int]:
        """Size and time of change (ns) of the file; zeros for a row of a data set or a URL. Raises `OSError`."""
        if self.remote is not None or self.version is not None:
            return 0, 0
        status = self.path.stat()
        return status.st_size, status.st_mtime_ns

    def identify(self) -> dict[str, Any]:
        """Source, size, time, version and content hash of the image, or the hash of the embeddings.

        Raises:
            OSError, ValueError: If it cannot be read.
        """
        size, mtime_ns = self.status()
        version = {"version": self.version} if self.version else {}
        return {"source": self.source, "size": size, "mtime_ns": mtime_ns, "blake2b": self.digest()} | version

    def digest(self) -> str:
        """Hash of the image, or of the embeddings; empty for a pipe, which can be read once. Raises as `identify`."""
        if self.embeds is not None:
            return _digest(self.embeds.numpy().tobytes())
        content = self.open().content
        if isinstance(content, bytes):
            return _digest(content)
        if isinstance(content, np.ndarray):
            return _digest(content.tobytes())
        if isinstance(content, str) and not os.path.exists(content):  # a data URI or base64
            return _digest(content.encode("utf-8", "surrogateescape"))
        path = Path(self.path if content is None else content)
        if not stat.S_ISREG(path.stat().st_mode):
            return ""
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()

    def require_unchanged(self) -> None:
        """Raises `ValueError` if the file is not the one that `identity` is of."""
        if self.identity is None or self.identity["blake2b"] == "":
            return
        if self.status() != (self.identity["size"], self.identity["mtime_ns"]):
            raise ValueError("the file changed while it was read; run again when it is complete, with --resume")


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


Named = tuple[Input, str]
"""An input, and its full name: the path as given, which is unique."""


def collect_images(paths: list[str]) -> list[Input]:
    """Every image in the given files and folders, named by its path relative to the argument.

    If two images have the same name, both are named by their full path as given. An image that two arguments hold is
    taken once. A file given as an argument is taken whatever its suffix. What a folder holds and cannot be read has a
    `problem`. A note on standard error counts the files in folders that are not images.

    Raises:
        UserError: If a path does not exist or no image is found.
    """
    left_out: Counter[str] = Counter()
    found = list(once(named for argument in paths for named in files_of(argument, left_out)))
    if not found:
        raise no_images(paths, left_out)
    if left_out:
        print(f"not images, left out: {describe_left_out(left_out)}", file=sys.stderr)
    return unique_names(found)


def files_of(argument: str, left_out: Counter[str] | None = None) -> Iterator[Named]:
    """The image file, or the images of the folder, that an argument names. `left_out` is that of `walk_images`.

    Raises:
        UserError: If the argument does not exist.
    """
    path = Path(argument)
    if not path.is_dir():
        require_existing(argument)
        yield Input(path.name, path), path.as_posix()
        return
    for image, problem in walk_images(path, left_out):
        full = image.as_posix()
        yield Input(image.relative_to(path).as_posix() if image != path else full, image, problem=problem), full


def require_existing(argument: str) -> None:
    """Raises `UserError` if a path does not exist, or cannot be looked at."""
    try:
        os.lstat(argument)
    except (OSError, ValueError) as error:  # the second for a null byte
        reason = getattr(error, "strerror", None) or str(error)
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {reason}"
        raise UserError(f"{argument} {reason}") from error


def once(found: Iterable[Named]) -> Iterator[Named]:
    """The inputs without those whose source came before. Keeps a hash of each source, about 100 bytes."""
    seen: set[bytes] = set()
    for item, full in found:
        key = hashlib.blake2b(os.fsencode(item.source), digest_size=16).digest()
        if key not in seen:
            seen.add(key)
            yield item, full


def unique_names(found: Iterable[Named]) -> list[Input]:
    """The inputs; those with equal names get their full ones."""
    found = list(found)
    while True:
        names = Counter(item.name for item, _ in found)
        if len(names) == len(found):
            return [item for item, _ in found]
        found = [(replace(item, name=full) if names[item.name] > 1 else item, full) for item, full in found]


def no_images(paths: Iterable[str], left_out: Counter[str]) -> UserError:
    """The error of arguments that hold no image."""
    others = f"; it holds {describe_left_out(left_out)}" if left_out else ""
    return UserError(f"no images in {', '.join(paths)}{others}")


def describe_left_out(left_out: Counter[str]) -> str:
    """The most common kinds of files that are not images, with their numbers."""
    others = ", ".join(f"{count} {suffix}" for suffix, count in left_out.most_common(5))
    return others + (", ..." if len(left_out) > 5 else "")


def load_embeddings(file: str | os.PathLike, width: int, use: str) -> list[Input]:
    """Caption embeddings as `vlv encode` writes them: one tensor `(Q, d_text)` for each image.

    Args:
        width: The model's d_text.
        use: `"caption"` or `"reconstruct"`: the command that reads them.

    Raises:
        UserError: If the file cannot be read, or its embeddings are for another model or another command.
    """
    try:
        tensors = load_file(file)
        with safe_open(file, "pt") as content:
            written_for = (content.metadata() or {}).get("for", use)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read as safetensors (`vlv encode` writes such files): {error}") from error
    if written_for != use:
        raise UserError(
            f"{file} holds embeddings for `vlv {written_for}`, from an encoder that `vlv {use}` does not use; write "
            f"the file again with `vlv encode --for {use}`"
        )
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or tensor.shape[1] != width:
            raise UserError(
                f"{file}: {name!r} has shape {tuple(tensor.shape)}, but the embeddings of this model have shape "
                f"(tokens, {width}); pass the --model that `vlv encode` was given"
            )
    if not tensors:
        raise UserError(f"{file} holds no embeddings; write them with `vlv encode`")
    return [Input(name, Path(file), tensor.float()) for name, tensor in tensors.items()]
