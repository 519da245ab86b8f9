"""The model of a command, its device and its precision."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from vlv.checkpoints import MINIATURE

from .errors import UserError
from .parsers.common import DTYPE_NAMES

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}


def choose_model(arguments: argparse.Namespace) -> str:
    """The `--model` given, or the embedded miniature, with a note on standard error.

    Raises:
        UserError: If no model is given and the embedded miniature is missing.
    """
    if arguments.model is not None:
        return arguments.model
    if not (MINIATURE / "config.json").is_file():
        raise UserError(
            f"the embedded miniature is missing ({MINIATURE}); train it with `make miniature`, or pass --model"
        )
    print("no --model given: using the embedded miniature (sixteen drawings, no photographs)", file=sys.stderr)
    return str(MINIATURE)


def choose_device(arguments: argparse.Namespace) -> str:
    """The `--device` given, else CUDA, MPS or the CPU.

    Raises:
        UserError: If torch cannot use the device.
    """
    if arguments.device is not None:
        try:
            torch.zeros(1, device=arguments.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device {arguments.device} cannot be used: {str(error).splitlines()[0]}") from error
        return arguments.device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def precision(arguments: argparse.Namespace) -> torch.dtype:
    """The torch dtype of `--dtype`."""
    return DTYPES[arguments.dtype]


@contextmanager
def loading(source: str) -> Iterator[None]:
    """Turns an error of loading a model into a `UserError` that names `source`."""
    try:
        yield
    except (OSError, ValueError, SafetensorError, StrictDataclassError) as error:
        raise UserError(f"cannot load {source}: {error}") from error
