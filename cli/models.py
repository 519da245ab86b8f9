"""The model of a command, its device, its precision and its scheduler."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from vlv.checkpoints import MINIATURE
from vlv.errors import UserError
from vlv.pipelines.schedulers import DEFAULT_SCHEDULER, OWN, build_scheduler

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
    print(
        "no --model given: using the embedded miniature, which knows sixteen drawings and no photographs; "
        "docs/tutorial.md makes a captioner of your own pictures",
        file=sys.stderr,
    )
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


def use_scheduler(pipeline: Any, name: str, option: str = "--scheduler") -> None:
    """Gives a pipeline the scheduler of that name.

    Raises:
        UserError: If there is no such scheduler, or it does not fit the model.
    """
    try:
        pipeline.scheduler = build_scheduler(name, pipeline.scheduler)
    except ValueError as error:
        raise UserError(f"{option}: {error}") from error


def use_default_scheduler(pipeline: Any) -> str:
    """Gives a pipeline `DEFAULT_SCHEDULER` or, with a note on standard error, leaves its own where that does not fit.

    Returns:
        The name of the scheduler.
    """
    try:
        use_scheduler(pipeline, DEFAULT_SCHEDULER)
    except UserError:
        comes_with = type(pipeline.scheduler).__name__
        print(f"{DEFAULT_SCHEDULER} does not fit the model: sampling by its own {comes_with}", file=sys.stderr)
        return OWN
    return DEFAULT_SCHEDULER
