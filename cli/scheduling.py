"""The scheduler of a command that generates images."""

import argparse
from typing import Any

from vlv.pipelines.schedulers import OWN, SCHEDULERS, build_scheduler

from .errors import UserError


def add_scheduler_argument(parser: argparse.ArgumentParser, default: str = OWN) -> None:
    """Adds `--scheduler`."""
    parser.add_argument(
        "--scheduler",
        metavar="NAME",
        default=default,
        help=f"the sampler of the denoising steps: {', '.join(SCHEDULERS[:-1])}, or {OWN} for the model's as it is "
        f"(default: {default})",
    )


def use_scheduler(pipeline: Any, name: str, option: str = "--scheduler") -> None:
    """Gives a pipeline the scheduler of that name.

    Raises:
        UserError: If there is no such scheduler, or it does not fit the model.
    """
    try:
        pipeline.scheduler = build_scheduler(name, pipeline.scheduler)
    except ValueError as error:
        raise UserError(f"{option}: {error}") from error
