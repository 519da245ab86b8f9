"""The scheduler of a command that generates images."""

import argparse

from vlv.pipelines import ReconstructionPipeline
from vlv.pipelines.schedulers import SCHEDULERS, build_scheduler

from .errors import UserError


def add_scheduler_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--scheduler`."""
    parser.add_argument(
        "--scheduler",
        metavar="NAME",
        help=f"how noise becomes an image: {', '.join(SCHEDULERS)} (default: the model's own)",
    )


def use_scheduler(pipeline: ReconstructionPipeline, name: str | None) -> None:
    """Replaces the pipeline's scheduler by that of `--scheduler`, if one is given.

    Raises:
        UserError: If there is no such scheduler, or it does not fit the model.
    """
    if name is None:
        return
    try:
        pipeline.scheduler = build_scheduler(name, pipeline.scheduler.config)
    except ValueError as error:
        raise UserError(f"--scheduler: {error}") from error
