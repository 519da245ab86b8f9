"""`--engine ray`: actors of a Ray cluster caption shards. Ray maps shards; the shards' files decide what is done.

A shard is a task of an actor that holds the model. When a process or a machine ends, Ray starts the actor again and
gives it the shard once more: it is absent until it is complete, so that nothing is lost or doubled.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from vlv.errors import UserError

from .sharded import ShardCaptioner, ShardJob
from .shards import ShardFolder

TRIES = 5
"""Of a shard, before the run ends: an image may end each process that reads it."""


def caption_by_ray(
    job: ShardJob, shards: ShardFolder, wanted: Sequence[int], actors: int | None, address: str | None
) -> Iterator[dict[str, int] | None]:
    """Captions shards; yields the counts of each when it is done.

    Args:
        job: Its `device` is `cpu`, `cuda`, or empty for GPUs if the cluster has any.
        wanted: Numbers of shards.
        actors: Models in the cluster, at most and by default one for each GPU or, without GPUs, one for each core.
        address: Of a running cluster, which sees the same folders; by default one is started on this machine.

    Raises:
        ImportError: If Ray is not installed.
        UserError: If Ray does not start, or a shard has ended `TRIES` processes.
    """
    ray = import_ray()
    started = not ray.is_initialized()
    if started:
        local: dict[str, Any] = {"num_cpus": actors, "include_dashboard": False} if address is None else {}
        try:
            ray.init(address=address, logging_level="warning", **local)
        except Exception as error:  # of a node that does not start, Ray raises an `Exception`
            raise UserError(f"Ray could not start, or be reached: {error}") from error
    try:
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        if job.device == "cpu":
            gpus = 0
        elif job.device == "cuda" and not gpus:
            raise UserError("--device cuda: the cluster of Ray has no GPU; leave it out, or give cpu")
        device = "cuda" if gpus else "cpu"
        most = gpus or max(1, int(resources.get("CPU", 1)))  # an actor beyond would wait for another to end
        count = min(actors or most, most, len(wanted))
        if actors is not None and actors > most:
            what = "GPUs" if gpus else "cores"
            print(f"note: --ray-actors {actors}: the cluster has {most} {what}, one for each actor", file=sys.stderr)
        options = {"num_cpus": 1, "num_gpus": 1 if gpus else 0, "max_restarts": -1, "max_task_retries": TRIES - 1}
        actor = ray.remote(**options)(ShardActor)
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        environment = {"env_vars": {} if gpus else threads}
        job = replace(
            job,
            device=device,
            model=os.path.abspath(job.model) if os.path.isdir(job.model) else job.model,
            embeddings_cache=job.embeddings_cache and os.path.abspath(job.embeddings_cache),
        )
        folder = shards.folder.absolute()  # an actor has a working folder of its own
        pool = [actor.options(runtime_env=environment).remote(job, folder) for _ in range(count)]
        yield from _map(ray, pool, list(wanted))
    finally:
        if started:
            ray.shutdown()


class ShardActor:
    """Holds the model in a process of Ray. The model is loaded with the first shard."""

    def __init__(self, job: ShardJob, folder: Any):
        self._job, self._shards = job, ShardFolder.open_existing(folder)
        self._captioner: ShardCaptioner | None = None

    def start(self) -> None:
        """Answers when the actor has a place in the cluster."""

    def caption(self, index: int) -> dict[str, int] | None:
        if self._captioner is None:
            self._captioner = self._job.load()
        return self._captioner.caption(self._shards, index)


def _map(ray: Any, pool: list[Any], wanted: list[int]) -> Iterator[dict[str, int] | None]:
    """Gives each actor that has started a shard, and the next one when it is done."""
    running: dict[Any, tuple[Any, int | None]] = {actor.start.remote(): (actor, None) for actor in pool}
    wanted.reverse()
    while wanted or any(index is not None for _, index in running.values()):
        (done, *_), _ = ray.wait(list(running))
        actor, index = running.pop(done)
        try:
            counts = ray.get(done)
        except ray.exceptions.RayActorError as error:
            if index is None:
                raise UserError(f"an actor of Ray could not start: {error}") from error
            raise UserError(
                f"shard {index} ended {TRIES} processes of Ray ({error}); caption it alone with --shard-index {index}"
            ) from error
        if wanted:
            following = wanted.pop()
            running[actor.caption.remote(following)] = (actor, following)
        if index is not None:
            yield counts


def import_ray() -> Any:
    """The module. Raises `ImportError` with a remedy if it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            "--engine ray needs the extra vlv[ray] (pip install '.[ray]' in its source folder)"
        ) from error
    return ray
