"""What both stages do before and after they train: the output folder, what the run starts from, what it leaves."""

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from vlv import hub

from .checkpoints import check_output_dir, is_main_process, move_aside, only_run_in, say
from .saving import Provenance
from .stage_config import StageConfig
from .trainer import VLVTrainer


@contextmanager
def output_folder(config: StageConfig) -> Iterator[None]:
    """Locks `output_dir` for this run; with `overwrite_output_dir` what is in it is renamed first.

    Raises:
        ValueError: If it is a folder of images, another run writes into it, or it cannot be written.
    """
    assert config.output_dir is not None
    with config.main_process_first(local=False, desc="preparing output_dir"):
        if is_main_process():
            check_output_dir(config)
            if config.overwrite_output_dir:
                with only_run_in(config.output_dir):
                    move_aside(config.output_dir)
    with only_run_in(config.output_dir):
        yield


def not_loaded(config: Any, setting: str, default: str, error: Exception, advice: str = "") -> FileNotFoundError:
    """The error for a model that could not be loaded, which names the setting and says whether it is the default.

    Args:
        advice: How to try the stage without a download.
    """
    source = getattr(config, setting)
    reason = " ".join(str(error).split()).removeprefix(f"{setting} {source} could not be loaded: ")
    whose = f" (the default of --{setting})" if source == default else ""
    return FileNotFoundError(
        f"{setting} {source}{whose} could not be loaded: {reason}" + (f". {advice}" if advice else "")
    )


def fingerprints(config: StageConfig, *names: str) -> dict[str, Any]:
    """`{name: {"source": ..., "fingerprint": ...}}` of the settings that name models."""
    values = {name: getattr(config, name) for name in names}
    return {name: {"source": value, "fingerprint": hub.fingerprint(value)} for name, value in values.items()}


def provenance(
    stage: str, start: str | None, sources: Mapping[str, Any], diffusion_model: hub.DiffusionModel | None
) -> Provenance:
    """Where a run comes from.

    Args:
        sources: `{name: {"source": ..., "fingerprint": ...}}` of the data and of the models that are read.
    """
    return Provenance(
        stage,
        start,
        diffusion_model,
        {name: value["source"] for name, value in sources.items()},
        {name: value["fingerprint"] for name, value in sources.items()},
    )


def train_and_save(trainer: VLVTrainer, config: Any) -> None:
    """Trains, and leaves the model in `output_dir`, with the text-to-image model if `export_decoder` says so.

    Raises:
        ValueError: If `export_decoder` is set, and no text-to-image model is known.
    """
    assert trainer.provenance is not None
    if config.export_decoder and trainer.provenance.diffusion_model is None:
        raise ValueError(
            f"export_decoder is set, but {trainer.provenance.start} does not name the text-to-image model that it was "
            "trained with; leave it out, and pass --diffusion-model to `vlv push`"
        )
    unsaved = trainer.train_to_end()
    if unsaved:
        trainer.save_model()
        trainer.save_state()
    if config.export_decoder and config.should_save:
        hub.add_diffusion_model(config.output_dir)
    if unsaved:
        trainer.save_record()


def say_how_to_use(config: Any, command: str) -> None:
    """Prints the command that uses the trained model: `vlv COMMAND IMAGES --model OUTPUT_DIR`."""
    say(f"the model is in {config.output_dir}; try: vlv {command} IMAGES --model {shlex.quote(config.output_dir)}")
