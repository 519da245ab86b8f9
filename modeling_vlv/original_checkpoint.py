"""Reads checkpoints of the authors' code without running code in them."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

WRAPPERS = ("model_state_dict", "state_dict", "module")


def read_weights(path: str | os.PathLike, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint by name, memory-mapped where the format allows it.

    A dictionary around the weights (`model_state_dict`) and a `module.` before all names are removed.

    Args:
        path: A file (`.bin`, `.pt`, `.safetensors`, or an index of several, `.index.json`), or a folder with one.
        names: Possible names of the file in a folder, in order of preference. `*` stands for a number; the highest is
            taken.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file could not be read, or holds anything but weights.
    """
    file = find_checkpoint(Path(path), names)
    if file.name.endswith(".index.json"):
        try:
            parts = sorted(set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is not an index of weights: {error!r}") from error
        weights: dict[str, torch.Tensor] = {}
        for part in parts:
            if not (file.parent / part).is_file():
                raise FileNotFoundError(f"{file.name} names {part}, which is not in {file.parent}")
            weights |= _read(file.parent / part)
    else:
        weights = _read(file)
    return _strip_module(weights)


def find_checkpoint(path: Path, names: tuple[str, ...]) -> Path:
    """`path` itself if it is a file, else the file in the folder `path` with one of `names` (`read_weights`)."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    for name in names:
        for candidate in (name, f"{name}.index.json", f"{name}/{name}", f"{name}/{name}.index.json"):
            found = [p for p in path.glob(candidate) if p.is_file()]
            if found:
                return max(found, key=_number)
        safe = name.replace("pytorch_model.bin", "model.safetensors")
        if name != safe:
            for candidate in (safe, f"{safe}.index.json"):
                if (path / candidate).is_file():
                    return path / candidate
    if (path / "zero_to_fp32.py").is_file() or (path / "latest").is_file():
        raise FileNotFoundError(
            f"{path} is a DeepSpeed checkpoint in pieces; merge them first, where DeepSpeed is installed: "
            f"python {path / 'zero_to_fp32.py'} {path} {path / 'pytorch_model.bin'}"
        )
    raise FileNotFoundError(f"there is no {' or '.join(names)} in {path}")


def _number(path: Path) -> tuple[int, str]:
    digits = "".join(c for c in path.stem if c.isdigit())
    return (int(digits) if digits else -1, path.name)


def _read(file: Path) -> dict[str, torch.Tensor]:
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} could not be read: {error}") from error
    try:
        content = _load(file)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} was not opened: it is damaged, a git-lfs pointer, or holds objects that could run code. Expected "
            "a checkpoint of weights alone; download it again, or save the state dict alone"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{file} could not be read; is it complete? {reason}") from error
    for name in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if isinstance(content, dict):
        content = {str(name): value for name, value in content.items()}
    else:
        raise ValueError(f"{file} holds a {type(content).__name__}, not a dictionary of weights")
    weights = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if not weights or len(weights) < len(content):
        others = [str(name) for name in content if name not in weights]
        raise ValueError(f"{file} holds {', '.join(others[:5]) or 'nothing'}; expected a dictionary of weights alone")
    return weights


def _load(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return torch.load(file, map_location="cpu", weights_only=True)  # the old format cannot be memory-mapped


def _strip_module(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Removes the `module.` that data-parallel training puts before every name. A `module.` within a name stays."""
    while weights and all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    return weights
