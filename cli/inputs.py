"""What a command is given: images in files and folders, or embeddings in a file."""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from vlv.files import find_images

from .errors import UserError


@dataclass(frozen=True)
class Input:
    """An image file (or embeddings), under the name that it has in the output."""

    name: str
    path: Path | None = None
    embeds: torch.Tensor | None = None  # (Q, d_text)


def collect_images(paths: list[str]) -> list[Input]:
    """Every image below the given files and folders, named by its path relative to the argument.

    Where two arguments would give the same name, both are named by their whole path as given. A file that is named
    itself is taken whatever its suffix.

    Raises:
        UserError: If a path does not exist or nothing is found.
    """
    found: list[tuple[str, Path]] = []
    for argument in paths:
        path = Path(argument)
        if path.is_dir():
            found += [(image.relative_to(path).as_posix(), image) for image in find_images(path)]
        elif path.exists():
            found.append((path.name, path))
        else:
            raise UserError(f"{argument} does not exist")
    if not found:
        raise UserError(f"no images in {', '.join(paths)} (jpg, jpeg, png, webp, bmp, gif, tif, tiff, in any case)")
    named = dict.fromkeys(found)
    while True:
        names = Counter(name for name, _ in named)
        clashing = {name for name, count in names.items() if count > 1}
        if not clashing:
            return [Input(name, path) for name, path in named]
        named = dict.fromkeys((path.as_posix() if name in clashing else name, path) for name, path in named)


def load_embeddings(file: str | os.PathLike, width: int, use: str) -> list[Input]:
    """Caption embeddings as `vlv encode` writes them: one tensor `(Q, d_text)` for each image.

    Args:
        use: `"caption"` or `"reconstruct"`: what they are read for.

    Raises:
        UserError: If the file is no such file, or its embeddings are of another model.
    """
    try:
        tensors = load_file(file)
        with safe_open(file, "pt") as content:
            written_for = (content.metadata() or {}).get("for", use)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read as safetensors (`vlv encode` writes such files): {error}") from error
    if written_for != use:
        raise UserError(
            f"{file} was written for `vlv {written_for}`, by the one of the model's two encoders whose embeddings "
            f"`vlv {use}` cannot read; write it again with `vlv encode --for {use}`"
        )
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or tensor.shape[1] != width:
            raise UserError(
                f"{file}: {name!r} has shape {tuple(tensor.shape)}, this model's embeddings are (tokens, {width}); "
                "were they written with another --model?"
            )
    if not tensors:
        raise UserError(f"{file} holds no embeddings")
    return [Input(name, embeds=tensor.float()) for name, tensor in tensors.items()]
