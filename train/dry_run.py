"""`--dry_run`: two steps and one save in a temporary folder, and the plan of the run."""

import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from .census import find_part, format_census, format_time, take_census, whole_size
from .checkpoints import check_output_dir, is_main_process, say
from .estimate import estimate
from .hardware import GPUS
from .lora import is_in_4_bits

STEPS = 2
REPLACED = {
    "max_steps": STEPS,
    "num_train_epochs": 0,
    "save_strategy": SaveStrategy.STEPS,
    "save_steps": STEPS,
    "validation_steps": 0,
    "eval_strategy": "no",
    "report_to": [],
    "overwrite_output_dir": False,
    "resume_from_checkpoint": None,
}


class _Stopwatch(TrainerCallback):
    """Seconds of the last step, without its save."""

    seconds = 0.0
    _since = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self._since = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        self.seconds = time.perf_counter() - self._since


class DryRun:
    """A run of two steps in a folder of its own.

    Args:
        config: It is changed, until `restore`.
        folder: Takes the place of `output_dir`.
    """

    def __init__(self, config: Any, folder: Path):
        self.config, self.folder = config, folder
        self.planned = {name: getattr(config, name) for name in (*REPLACED, "output_dir")}
        for name, value in REPLACED.items():
            setattr(config, name, value)
        config.output_dir = str(folder)

    def restore(self) -> None:
        for name, value in self.planned.items():
            setattr(self.config, name, value)

    def run(self, trainer: Any) -> None:
        """Trains two steps, saves a checkpoint, and prints the plan of the run that was configured."""
        stopwatch = _Stopwatch()
        trainer.add_callback(stopwatch)
        trainer.train()
        checkpoint = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        model = sum(path.stat().st_size for path in self.folder.rglob("*.safetensors"))
        if not any(self.folder.glob("checkpoint-*/config.json")):  # the checkpoint is no complete model
            model = sum(map(_saved_bytes, trainer.model.parameters()))
        self.restore()
        say(self.plan(trainer, stopwatch.seconds, checkpoint, model))

    def plan(self, trainer: Any, seconds: float, checkpoint: int, model: int) -> str:
        """The plan as lines of text.

        Args:
            seconds: Of a step.
            checkpoint, model: Bytes of a checkpoint, and of the weights in it.
        """
        config, steps = self.config, trainer.last_step()
        census = format_census(take_census(trainer)).splitlines()
        lines = ["plan of the run (nothing of it is kept):", *(line for line in census if "expected time" not in line)]
        lines += ["parameters by part:", *count_parameters(trainer)]
        lines.append(f"memory: {measured_memory(config.device)}; {estimated_memory(config)}")
        without = "sampling, scoring" if hasattr(config, "rounds") else "validation, evaluation"
        lines.append(
            f"expected time: {format_time(steps * seconds)} ({steps:,} steps of {seconds:.3g} s, the time of the "
            f"second step; without {without} and saving)"
        )
        kept = int(steps // config.save_steps) if config.save_steps >= 1 else int(1 / config.save_steps)
        if config.save_strategy == SaveStrategy.NO:
            kept = 0
        if config.save_total_limit:
            kept = min(kept, config.save_total_limit)
        needed, free = kept * checkpoint + model, shutil.disk_usage(self.folder.parent).free
        lines.append(
            f"disk: {needed / 1e9:.3g} GB ({kept} checkpoints of {checkpoint / 1e9:.3g} GB and the model of "
            f"{model / 1e9:.3g} GB); {free / 1e9:.3g} GB are free"
            + ("; this is not enough, save_total_limit keeps fewer checkpoints" if needed > free else "")
        )
        return "\n".join(lines)


def _saved_bytes(parameter: torch.nn.Parameter) -> int:
    """The size of a parameter in a complete model, which has weights in 4 bits dequantised to float32."""
    return 4 * whole_size(parameter) if is_in_4_bits(parameter) else parameter.nbytes


@contextmanager
def dry_run(config: Any) -> Iterator[DryRun | None]:
    """Lets the run write into a hidden folder beside `output_dir`, which is removed; None where it is a real run.

    Raises:
        ValueError: If `output_dir` would be refused, see `check_output_dir`.
    """
    if not config.dry_run:
        yield None
        return
    check_output_dir(config)
    target = Path(config.output_dir).absolute()
    beside = next(parent for parent in target.parents if parent.is_dir())
    folder = beside / f".{target.name}-dry-run"  # all processes need the same
    if is_main_process():
        shutil.rmtree(folder, ignore_errors=True)
    run = DryRun(config, folder)
    try:
        yield run
    finally:
        run.restore()
        if is_main_process():
            shutil.rmtree(folder, ignore_errors=True)


def count_parameters(trainer: Any) -> list[str]:
    """Lines such as `  projector: 1,234 trainable, 0 frozen`, of the model and of the frozen diffusion model."""
    counts: dict[str, list[int]] = {}
    for name, parameter in trainer.model.named_parameters():
        part = counts.setdefault(".".join(find_part(name)), [0, 0])
        part[0 if parameter.requires_grad else 1] += whole_size(parameter)
    decoder = getattr(trainer, "diffusion_decoder", None)
    for name, child in decoder.named_children() if decoder is not None else ():
        counts[f"diffusion model: {name}"] = [0, sum(parameter.numel() for parameter in child.parameters())]
    return [f"  {name}: {trained:,} trainable, {frozen:,} frozen" for name, (trained, frozen) in counts.items()]


def measured_memory(device: torch.device) -> str:
    """The most memory so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return f"at most {torch.cuda.max_memory_allocated(device) / 1e9:.3g} GB of the GPU were used"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"the process used at most {peak / 1e9:.3g} GB"


def estimated_memory(config: Any) -> str:
    """The memory that `vlv estimate` counts for a GPU of this run."""
    try:
        found = estimate(config, GPUS["H100"], config.world_size, samples=1)
    except (ValueError, TypeError, NotImplementedError) as error:
        return f"vlv estimate cannot tell it: {error}"
    return f"vlv estimate counts {found.memory.total() / 1e9:.3g} GB on each GPU"
