"""What both stages do before they train: the output folder, and what the run starts from."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vlv.hub import fingerprint

from .checkpoints import is_main_process, move_aside, only_run_in
from .stage_config import StageConfig


@contextmanager
def output_folder(config: StageConfig) -> Iterator[None]:
    """Locks `output_dir` for this run; with `overwrite_output_dir` an earlier run in it is renamed first.

    Raises:
        ValueError: If another run writes into it.
        OSError: If it cannot be written.
    """
    assert config.output_dir is not None
    with config.main_process_first(local=False, desc="preparing output_dir"):
        if config.overwrite_output_dir and is_main_process():
            with only_run_in(config.output_dir):
                move_aside(config.output_dir)
    with only_run_in(config.output_dir):
        yield


def fingerprints(config: StageConfig, *names: str) -> dict[str, Any]:
    """`{name: {"source": ..., "fingerprint": ...}}` of the settings that name models."""
    return {
        name: {"source": getattr(config, name), "fingerprint": fingerprint(getattr(config, name))} for name in names
    }
