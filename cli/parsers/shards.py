"""The options of captions in shards, and of the speed of many."""

import argparse
import os
from typing import NamedTuple

from vlv.errors import UserError

from .common import not_negative, positive

ENGINES = ("local", "ray", "vllm")
ONLY_WITH_SHARDS = ("shard_index", "output_dir", "engine", "ray_actors", "ray_address", "restart_every")


def add_shard_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of shards."""
    group = parser.add_argument_group("shards", "Many images, on several processes or machines (docs/bulk.md).")
    group.add_argument(
        "--shards",
        type=positive,
        metavar="N",
        help="write N files into --output-dir, each complete or absent; those that exist are skipped. Images are "
        "divided by their names, and --dataset by its rows; a tar, parquet or list file is a shard, or a part of one. "
        "A process of `accelerate launch` or of a Slurm array does its share of the shards; a task of an array then "
        "does what is left",
    )
    group.add_argument("--shard-index", type=not_negative, metavar="I", help="caption shard I alone, from 0")
    group.add_argument("--output-dir", metavar="DIR", help="the folder of the shards")
    group.add_argument(
        "--merge",
        metavar="DIR",
        help="write the captions of all shards in a folder into --output (json, jsonl, csv, parquet), or by --sidecar "
        "beside their images",
    )
    group.add_argument(
        "--engine",
        choices=ENGINES,
        help="local: in this process (the default); ray: in actors of a Ray cluster; vllm: vLLM writes the captions",
    )
    group.add_argument(
        "--ray-actors",
        type=positive,
        metavar="N",
        help="models in the cluster, at most one for each GPU, or core (the default)",
    )
    group.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="of a cluster, or auto (default: one on this machine, which ends with the run)",
    )
    group.add_argument(
        "--restart-every",
        type=positive,
        metavar="M",
        help="shards after which vLLM is started anew, since it keeps memory (default: 50)",
    )


def add_speed_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the speed of many captions."""
    parser.add_argument(
        "--num-workers",
        type=not_negative,
        default=0,
        metavar="N",
        help="processes that read images while others are captioned, through shared memory (default: 0, which reads "
        "them between batches)",
    )
    parser.add_argument(
        "--static-cache",
        action="store_true",
        help="give the language model's cache its full size at once; the captions are the same (docs/bulk.md)",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the vision tower and the step that writes a token with torch.compile, with --static-cache, "
        "and not of beams; the first batch takes minutes",
    )


class Place(NamedTuple):
    """The place of a process among those of a launcher.

    Args:
        rank: From 0; of an array with gaps, the number of the task.
        processes: Their number; None for an array with gaps.
        takes_others: Whether the process goes on with the shards of others that are not done.
    """

    rank: int
    processes: int | None
    takes_others: bool = False


def distribution() -> Place:
    """Which shards the environment gives to this process.

    `accelerate launch` and torchrun set RANK and WORLD_SIZE; Slurm sets SLURM_ARRAY_TASK_... in the tasks of an array.
    A task of an array goes on with the shards of others, so that an array with gaps, which repeats failed tasks or has
    no task of some share, does all shards, too.

    Raises:
        UserError: If the variables are no numbers, or contradict each other.
    """
    if (processes := _variable("WORLD_SIZE", 1)) > 1:
        rank = _variable("RANK")
        if rank >= processes:
            raise UserError(f"RANK is {rank} and WORLD_SIZE {processes}; RANK must be smaller")
        return Place(rank, processes)
    if "SLURM_ARRAY_TASK_ID" not in os.environ:
        return Place(0, 1)
    task, count = _variable("SLURM_ARRAY_TASK_ID"), _variable("SLURM_ARRAY_TASK_COUNT", 1)
    first, step = _variable("SLURM_ARRAY_TASK_MIN", 0), max(1, _variable("SLURM_ARRAY_TASK_STEP", 1))
    last = _variable("SLURM_ARRAY_TASK_MAX", first + (count - 1) * step)
    if last - first != (count - 1) * step:
        return Place(task, None, takes_others=True)
    return Place((task - first) // step, count, takes_others=True)


def _variable(name: str, default: int | None = None) -> int:
    """A variable of the environment that is a number from 0 up."""
    text = os.environ.get(name, "" if default is None else str(default))
    if not (text.isascii() and text.isdigit()):
        raise UserError(
            f"the environment variable {name} is {text!r}; expected a number, as `accelerate launch` and Slurm set it "
            "(to caption without them, unset WORLD_SIZE and SLURM_ARRAY_TASK_ID, or pass --shard-index)"
        )
    return int(text)
