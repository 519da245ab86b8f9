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

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--model`, `--revision`, `--device` and `--dtype`, which are the same for all commands."""
    parser.add_argument(
        "--model",
        metavar="DIR_OR_REPO",
        help="folder or Hub repo id of a VLV (default: the embedded miniature, which knows sixteen drawings)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repo; a commit gives repeatable results")
    parser.add_argument("--device", help="such as cpu, cuda or mps (default: cuda or mps if available, else cpu)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="precision (default: float32)")


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
