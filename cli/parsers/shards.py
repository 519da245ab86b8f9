"""The options of captions in shards, and of the speed of many."""

import argparse
import os

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
        help="write N files into --output-dir, each complete or absent; those that exist are skipped. Folders are "
        "divided by the images' names; a tar, parquet or list file is a shard, or a part of one. A process of "
        "`accelerate launch` or of a Slurm array does its share of the shards",
    )
    group.add_argument("--shard-index", type=not_negative, metavar="I", help="caption shard I alone, from 0")
    group.add_argument("--output-dir", metavar="DIR", help="the folder of the shards")
    group.add_argument(
        "--merge",
        metavar="DIR",
        help="write the captions of all shards in a folder into --output: json, jsonl, parquet",
    )
    group.add_argument(
        "--engine",
        choices=ENGINES,
        help="local: in this process (the default); ray: in actors of a Ray cluster; vllm: vLLM writes the captions",
    )
    group.add_argument(
        "--ray-actors", type=positive, metavar="N", help="models in the cluster (default: one for each GPU, or core)"
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


def distribution() -> tuple[int, int] | int:
    """Which shards the environment gives to this process: `(rank, number of processes)`, or one shard.

    `accelerate launch` and torchrun set RANK and WORLD_SIZE; Slurm sets SLURM_ARRAY_TASK_... in the tasks of an array.
    A task of an array with gaps, such as one that repeats failed tasks, does the shard of its number.
    """
    variables = os.environ
    if int(variables.get("WORLD_SIZE", 1)) > 1:
        return int(variables["RANK"]), int(variables["WORLD_SIZE"])
    if "SLURM_ARRAY_TASK_ID" not in variables:
        return 0, 1
    task, count = int(variables["SLURM_ARRAY_TASK_ID"]), int(variables.get("SLURM_ARRAY_TASK_COUNT", 1))
    first, step = int(variables.get("SLURM_ARRAY_TASK_MIN", 0)), int(variables.get("SLURM_ARRAY_TASK_STEP", 1))
    last = int(variables.get("SLURM_ARRAY_TASK_MAX", first + (count - 1) * step))
    if last - first != (count - 1) * step:
        return task
    return (task - first) // step, count
