"""Callbacks of all trainers: random numbers per process, the end by a signal, validation samples, what is printed."""

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.utils import enable_progress_bars
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, set_seed
from transformers.utils import logging

from .checkpoints import is_main_process

logger = logging.get_logger(__name__)

SAME_KEY_PRESS = 2.0
"""Seconds within which a process of several counts SIGINT once."""
INTERRUPTED = b"\ninterrupted; a checkpoint is saved after this step (Ctrl-C again ends at once)\n"


class PerProcessSeedCallback(TrainerCallback):
    """Gives each process its own random numbers, so that the processes do not add the same noise to their images.

    `Trainer` seeds all processes alike. `on_train_begin` is called after the order of the data is set and before a
    resumed run restores its random state, so neither changes.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        set_seed(args.seed + args.process_index)


class TerminationCallback(TrainerCallback):
    """After SIGTERM, with which schedulers end a job, or Ctrl-C, the run saves a checkpoint and stops.

    A second Ctrl-C raises `KeyboardInterrupt`; in a dry run, which keeps nothing, the first one does. A signal to one
    process of several stops them all. Processes of the data loader, which inherit the handlers, ignore Ctrl-C.
    """

    def __init__(self):
        self.signal = 0
        """Number of the signal that has asked this run to end, or 0."""
        self._before: dict[int, Any] = {}
        self._process, self._world_size, self._time = 0, 1, 0.0

    @property
    def requested(self) -> bool:
        return self.signal != 0

    @property
    def word(self) -> str:
        """What has happened to the run, for a message."""
        return "interrupted" if self.signal == signal.SIGINT else "terminated"

    def on_train_begin(self, args, state, control, **kwargs):
        self._process, self._world_size = os.getpid(), args.world_size
        if threading.current_thread() is threading.main_thread():  # only that one may handle signals
            for number in (signal.SIGTERM, *(() if getattr(args, "dry_run", False) else (signal.SIGINT,))):
                self._before[number] = signal.signal(number, self._request)

    def _request(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:
            return
        if number == signal.SIGINT:
            now = time.monotonic()
            # torchrun passes on what the terminal has sent to all processes already
            repeated = self._world_size > 1 and now - self._time < SAME_KEY_PRESS
            if self.signal == signal.SIGINT and not repeated:
                raise KeyboardInterrupt
            self._time = now
            if not repeated and is_main_process():
                os.write(2, INTERRUPTED)  # print may not be called while it is running
        self.signal = number

    def share(self, args: Any) -> bool:
        """Tells all processes, which call it together, whether one of them has to end."""
        if args.world_size > 1:
            number = torch.tensor(float(self.signal), device=args.device)
            torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
            self.signal = int(number)
        return self.requested

    def on_step_end(self, args, state, control, **kwargs):
        if self.share(args):
            control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        """Puts back the handlers of before the training."""
        while self._before:
            number, before = self._before.popitem()
            signal.signal(number, signal.SIG_DFL if before is None else before)


class ValidationCallback(TrainerCallback):
    """Validates the model every `every` steps. Validation does not change the training.

    The model is in evaluation mode during validation. Its mode and the random state are restored afterwards. A
    validation that fails is logged, and the training goes on.

    Args:
        validate: Called as `validate(model, step, folder)`; writes its results to `folder`, `OUTPUT_DIR/samples`.
        every: Number of steps between validations; 0 turns validation off.
        on_all_processes: All processes compute the same, as models need whose weights are sharded over them. By
            default the first one alone does. The first one alone writes to `OUTPUT_DIR/samples`.
        weights: Called with the model; its context has the weights that are validated. Its errors end the training,
            because weights that could not be put back would be trained on.
    """

    def __init__(
        self,
        validate: Callable[[Any, int, Path], None],
        every: int,
        on_all_processes: bool = False,
        weights: Callable[[Any], AbstractContextManager] = nullcontext,
    ):
        self.validate, self.every, self.on_all_processes, self.weights = validate, every, on_all_processes, weights

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.every <= 0 or state.global_step % self.every:
            return
        if not state.is_world_process_zero and not self.on_all_processes:
            return
        with tempfile.TemporaryDirectory() as folder:  # written to by the processes whose results are not needed
            samples = Path(args.output_dir) / "samples" if state.is_world_process_zero else Path(folder)
            failure = None
            try:
                samples.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                failure = error
            if self.on_all_processes and args.world_size > 1:  # one that fails alone would leave the others waiting
                failed = torch.tensor(float(failure is not None), device=args.device)
                torch.distributed.all_reduce(failed)
                failure = failure or (OSError("another process cannot write") if failed else None)
            if failure is not None:
                logger.warning(f"the validation at step {state.global_step} failed: {failure}")
            else:
                with self.weights(model):
                    self._validate(model, state.global_step, samples)

    def _validate(self, model: Any, step: int, folder: Path) -> None:
        was_training, random_state = model.training, torch.get_rng_state()
        try:
            with torch.no_grad():
                self.validate(model.eval(), step, folder)
        except Exception as error:
            logger.warning(f"the validation at step {step} failed: {type(error).__name__}: {error}")
        finally:
            model.train(was_training)
            torch.set_rng_state(random_state)


class ProgressBarCallback(ProgressCallback):
    """One progress bar, which shows the last logged loss, learning rate and images per second.

    transformers' own `ProgressCallback` writes a line above its bar for each log, and counts the steps before a
    resumed run as if they had been computed in its first second.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="training", unit="step", dynamic_ncols=True
            )
        self.current_step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or not logs or "loss" not in logs:
            return
        shown = {
            "loss": f"{logs['loss']:.4g}",
            "lr": f"{logs['learning_rate']:.3g}",
            "images/s": f"{logs['images_per_second']:.1f}",
        }
        if "images_skipped" in logs:
            shown["skipped"] = str(logs["images_skipped"])
        self.training_bar.set_postfix(shown)


class LogLinesCallback(PrinterCallback):
    """A line for each log, but for those of a round of stage 3, of which the trainer prints a summary."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "round" not in (logs or {}):
            super().on_log(args, state, control, logs=logs, **kwargs)


def disable_loading_bars() -> None:
    """Turns off transformers' bars for reading and writing weights, which would overwrite the bar of the training."""
    logging.disable_progress_bar()
    if not constants.HF_HUB_DISABLE_PROGRESS_BARS:  # the line above also turns off the bars of downloads
        enable_progress_bars()
