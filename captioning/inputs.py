"""Values and inputs of a command: numbers, images in files and folders, embeddings in a file."""

import hashlib
import os
import stat
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from vlv.errors import UserError
from vlv.image_files import walk_images


@dataclass(frozen=True)
class Input:
    """An image file or caption embeddings, with the name that the output uses.

    Args:
        path: The image file, or the file that holds the embeddings.
        problem: Why the file cannot be read, where that is known already.
        identity: See `identify`.
    """

    name: str
    path: Path
    embeds: torch.Tensor | None = None  # (Q, d_text)
    problem: str | None = None
    identity: Mapping[str, Any] | None = None

    @property
    def source(self) -> str:
        """The absolute path, with the name for embeddings, of which a file holds many."""
        return os.path.abspath(self.path) + ("" if self.embeds is None else f"#{self.name}")

    def identify(self) -> dict[str, Any]:
        """Source, size, time and content hash of the file, or the hash of the embeddings. Raises `OSError`."""
        status = self.path.stat()
        return {
            "source": self.source,
            "size": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "blake2b": self.digest(),
        }

    def digest(self) -> str:
        """Hash of the file, or of the embeddings; empty for a pipe, which can be read once. Raises `OSError`."""
        if self.embeds is not None:
            return hashlib.blake2b(self.embeds.numpy().tobytes(), digest_size=16).hexdigest()
        if not stat.S_ISREG(self.path.stat().st_mode):
            return ""
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def collect_images(paths: list[str]) -> list[Input]:
    """Every image in the given files and folders, named by its path relative to the argument.

    If two images have the same name, both are named by their full path as given. An image that two arguments hold is
    taken once. A file given as an argument is taken whatever its suffix. What a folder holds and cannot be read has a
    `problem`. A note on standard error counts the files in folders that are not images.

    Raises:
        UserError: If a path does not exist or no image is found.
    """
    found: list[tuple[str, Path, str | None]] = []
    left_out: Counter[str] = Counter()
    for argument in paths:
        path = Path(argument)
        if path.is_dir():
            found += [
                (image.relative_to(path).as_posix() if image != path else path.as_posix(), image, problem)
                for image, problem in walk_images(path, left_out)
            ]
            continue
        try:
            path.lstat()
        except OSError as error:
            reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
            raise UserError(f"{argument} {reason}") from error
        found.append((path.name, path, None))
    once: dict[str, tuple[str, Path, str | None]] = {}
    for entry in found:
        once.setdefault(os.path.abspath(entry[1]), entry)
    found = list(once.values())
    others = ", ".join(f"{count} {suffix}" for suffix, count in left_out.most_common(5))
    if len(left_out) > 5:
        others += ", ..."
    if not found:
        raise UserError(f"no images in {', '.join(paths)}" + (f"; it holds {others}" if others else ""))
    if others:
        print(f"not images, left out: {others}", file=sys.stderr)
    named = dict.fromkeys(found)
    while True:
        names = Counter(name for name, *_ in named)
        clashing = {name for name, count in names.items() if count > 1}
        if not clashing:
            return [Input(name, path, problem=problem) for name, path, problem in named]
        named = dict.fromkeys((path.as_posix() if name in clashing else name, path, why) for name, path, why in named)


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
