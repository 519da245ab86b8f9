"""Stops a run whose loss is not finite, or far above what it was."""

import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from vlv.files import write_json

DIVERGENCE_FILE = "divergence.json"
WINDOW, ENOUGH = 100, 20
"""Steps whose median a loss is compared with, and the fewest of them."""
NAMES_SHOWN = 8


class DivergedError(ValueError):
    """The loss is not finite, or far above what it was. The message says where the checkpoint and the images are."""


class LossWatch:
    """Says whether a loss is not finite, or has jumped.

    Args:
        factor: Above 0: the greatest loss, as a multiple of the median of the last `WINDOW` steps.
    """

    def __init__(self, factor: float = 0.0):
        self.factor = factor
        self.losses: deque[float] = deque(maxlen=WINDOW)

    def check(self, loss: float) -> str | None:
        """What is wrong with the loss of a step, if anything is."""
        if not math.isfinite(loss):
            return str(loss)
        if self.factor and len(self.losses) >= ENOUGH and loss > self.factor * statistics.median(self.losses):
            return f"{loss:.4g}, above {self.factor:g} times the median of the last {len(self.losses)} steps"
        self.losses.append(loss)
        return None


class DivergenceCallback(TrainerCallback):
    """Stops a run before the optimiser takes a step with a loss that is not finite or has jumped.

    The weights and the optimiser's state before that step go to `OUTPUT_DIR/diverged-STEP`, with the names of the
    images of the batch in `divergence.json`. It is not among the checkpoints that a run goes on from.

    Args:
        trainer: Its `batch_names` are the images of the batch that is trained on.
        factor: As in `LossWatch`.
    """

    def __init__(self, trainer: Any, factor: float = 0.0):
        self.trainer, self.watch = trainer, LossWatch(factor)
        self._step: list[tuple[torch.Tensor, list[str]]] = []

    def add(self, loss: torch.Tensor, names: Any) -> None:
        """Notes the loss of a batch of this process. It does not wait for the device."""
        self._step.append((loss.detach(), list(names)))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        batches, self._step = self._step, []
        if not batches:
            return
        own = torch.stack([loss.float() for loss, _ in batches])
        loss = self.trainer.accelerator.reduce(own.sum(), "mean").item()
        reason = self.watch.check(loss)
        if reason is None:
            return
        finite = torch.isfinite(own).tolist()
        names = [name for (_, part), fine in zip(batches, finite, strict=True) if not fine for name in part]
        if math.isfinite(loss):
            names = [name for _, part in batches for name in part]
        self._stop(args, state.global_step, loss, self._gather(names), reason)

    def _gather(self, names: list[str]) -> list[str]:
        if self.trainer.args.world_size == 1:
            return names
        from accelerate.utils import gather_object

        return gather_object(names)

    def _stop(self, args: Any, step: int, loss: float, names: list[str], reason: str) -> None:
        trainer, folder = self.trainer, Path(args.output_dir) / f"diverged-{step}"
        trainer.save_model(str(folder), _internal_call=True)
        trainer._save_optimizer_and_scheduler(str(folder))
        if args.should_save:
            trainer.state.save_to_json(str(folder / "trainer_state.json"))
            write_json(folder / DIVERGENCE_FILE, {"step": step, "loss": str(loss), "images": names})
        trainer.accelerator.wait_for_everyone()
        shown = ", ".join(names[:NAMES_SHOWN]) + (
            f" and {len(names) - NAMES_SHOWN} more" if names[NAMES_SHOWN:] else ""
        )
        raise DivergedError(
            f"the loss of step {step + 1} is {reason}; the batch: {shown}. The model before that step is in {folder}. "
            "Remove images that are at fault, or lower the learning rate; the same command goes on from the last "
            "checkpoint"
        )
