"""The base class of both trainers."""

import contextlib
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import save_fsdp_optimizer
from safetensors import SafetensorError
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vlv import VLVForConditionalGeneration, VLVModel
from vlv.files import read_json, write_json

from .average import AverageCallback
from .callbacks import (
    LogLinesCallback,
    PerProcessSeedCallback,
    ProgressBarCallback,
    TerminationCallback,
    ValidationCallback,
)
from .census import CensusCallback
from .checkpoints import RECORD_FILE, check_settings, last_checkpoint, list_files, remove_old_checkpoints, say
from .data_loading import DataLoadingMixin
from .divergence import DivergenceCallback
from .evaluating import EvaluationMixin, EvaluationSet
from .freezing import trainable_names
from .lora import has_lora, is_4bit
from .memory import compile_layers, enable_activation_checkpointing
from .meters import QUARTILES, Means, Speedometer, TimedIterator
from .modes import set_train_mode
from .saving import Provenance, write_model, write_partial_checkpoint
from .sharding import check_optimiser_state, configure_fsdp, gather_weights, load_weights
from .stage_config import StageConfig, same_command
from .trackers import report
from .training_metadata import write_training_metadata
from .utilisation import count_flops

RESUMABLE_EXIT_CODE = 75
"""Exit code after SIGTERM: EX_TEMPFAIL of sysexits.h, the same command goes on later."""
INTERRUPTED_EXIT_CODE = 130
"""Exit code after Ctrl-C, as of shells."""

UNFINISHED_FOLDER = ".unfinished"
TORCH_WRITERS = ("PytorchStreamWriter", "inline_container")  # in the messages of torch.save
MODELS = (VLVModel, VLVForConditionalGeneration)
HALF_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class VLVTrainer(DataLoadingMixin, EvaluationMixin, Trainer):
    """A `Trainer` that keeps frozen parts in evaluation mode, logs its speed, and stops when its loss is not finite.

    It logs `images_per_second` and `tokens_per_second` (stage 2), of all processes together, `data_wait_share`, the
    share of time spent waiting for data, and `images_skipped`, the number of unreadable images so far, if there were
    any; on GPUs `peak_memory_gb`, the most of any, and where their peak speed is known `model_flops_utilisation`.
    """

    length = "max_steps"
    """The setting to raise to train a finished run further."""

    def __init__(self, model, args: Any, *more, **kwargs):
        if isinstance(args, StageConfig):
            enable_activation_checkpointing(model, args)  # before DDP, which asks whether it is on
        if kwargs.get("eval_dataset") is not None:
            kwargs["eval_dataset"] = EvaluationSet(kwargs["eval_dataset"])
        if args.n_gpu > 1:  # `Trainer` would copy the model to each of them in each step (DataParallel)
            raise ValueError(
                f"one process sees {args.n_gpu} GPUs, and trains on one; launch with torchrun --nproc_per_node "
                f"{args.n_gpu} (or accelerate launch), or set CUDA_VISIBLE_DEVICES=0"
            )
        super().__init__(model, args, *more, **kwargs)
        if is_4bit(model) and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                f"load_in_4bit does not work with {'FSDP' if self.is_fsdp_enabled else 'DeepSpeed'}, which would "
                "shard weights in 4 bits; launch with DDP (ddp_8gpu.yaml) or one process, or leave load_in_4bit out"
            )
        if self.is_fsdp_enabled:
            configure_fsdp(self.accelerator.state.fsdp_plugin, self.model, self._fsdp_dtype())
        if isinstance(args, StageConfig) and args.compile_blocks:
            compile_layers(self.model, args.device)
        self.average = AverageCallback(args.ema_decay) if getattr(args, "ema_decay", 0) else None
        if self.average is not None:
            if self.is_deepspeed_enabled:
                raise ValueError("ema_decay does not work with DeepSpeed, which hides the weights; leave it out")
            self.add_callback(self.average)
        if self.is_deepspeed_enabled and getattr(args, "save_only_trainable", False):
            raise ValueError(
                "save_only_trainable does not work with DeepSpeed, which saves all weights by itself; leave it out"
            )
        self.accumulated = 0
        """Batches of the present optimiser step so far."""
        self.add_callback(PerProcessSeedCallback())
        if self.pop_callback(ProgressCallback) is not None:  # absent with disable_tqdm and in notebooks
            self.add_callback(ProgressBarCallback())
        if self.pop_callback(PrinterCallback) is not None:  # with disable_tqdm
            self.add_callback(LogLinesCallback())
        self._skipped = 0
        self.speed = Speedometer(args.device)
        self.means = Means(QUARTILES, args.device)
        """Means of the training since the last log."""
        self.divergence = DivergenceCallback(self, getattr(args, "stop_loss_factor", 0))
        self.add_callback(self.divergence)
        self.termination = TerminationCallback()
        self.add_callback(self.termination)
        self.settings: dict[str, Any] = {}
        self.changes: list[dict[str, Any]] = []
        """What a resumed run changed, by the step from which on it holds."""
        self.provenance: Provenance | None = None
        self._trained: set[str] = set()
        self._unfinished: str | None = None
        """Folder of the checkpoint that is being written."""

    @property
    def is_sharded(self) -> bool:
        """Whether processes hold parts of the weights, so that all have to take part in each forward pass."""
        zero3 = self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3
        return self.is_fsdp_enabled or zero3 or getattr(self.args, "shard_diffusion_model", False)

    def _fsdp_dtype(self) -> torch.dtype | None:
        """The precision in which FSDP gathers parameters, if it is not their own."""
        return HALF_DTYPES.get(self.accelerator.mixed_precision) if self.is_fsdp_enabled else None

    def autocast(self) -> torch.autocast:
        """Autocast for FSDP2 in mixed precision; accelerate applies its own in all other cases."""
        dtype = self._fsdp_dtype()
        return torch.autocast(self.args.device.type, dtype=dtype, enabled=dtype is not None)

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        stack = super().compute_loss_context_manager()
        if self._fsdp_dtype() is not None:
            stack.enter_context(self.autocast())
        return stack

    def averaged_weights(self, model: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
        """The average of `ema_decay` in the place of the weights, if there is one: it is what the training leaves."""
        return contextlib.nullcontext() if self.average is None else self.average.borrowed(model)

    def add_validation(self, validate: Callable[[Any, int, Path], None]) -> None:
        """Calls `validate` every `validation_steps` with the averaged weights, see `ValidationCallback`."""

        def validate_in_precision(model: Any, step: int, folder: Path) -> None:
            with self.autocast():
                validate(model, step, folder)

        every, on_all_processes = self.args.validation_steps, self.is_sharded
        self.add_callback(ValidationCallback(validate_in_precision, every, on_all_processes, self.averaged_weights))

    def train_to_end(self) -> bool:
        """Trains to the last step, from the newest checkpoint of `output_dir` if there is one.

        Returns:
            Whether the model has to be saved; False if `output_dir` holds the finished run already.

        Raises:
            ValueError: If settings differ from those of the checkpoint, or a finished run has no checkpoint to go on
                from.
            SystemExit: With code 75 after SIGTERM and 130 after Ctrl-C, when a checkpoint has been saved.
        """
        args: Any = self.args
        checkpoint = args.resume_from_checkpoint or last_checkpoint(args.output_dir)
        finished = Path(args.output_dir) / RECORD_FILE
        done = read_json(finished, "steps")["steps"] if finished.is_file() else 0
        if checkpoint is not None or done:
            other = args.other_settings()
            self.changes = check_settings(checkpoint or args.output_dir, self.settings, args.accept_changes, other)
        last = self.last_step()
        if done >= last:
            say(f"{args.output_dir} holds the finished run of {done} steps; raise {self.length} to train it further")
            return False
        if checkpoint is None and done:
            raise ValueError(
                f"{args.output_dir} holds a finished run of {done} steps, and no checkpoint to go on from; pass it as "
                "--model with another --output_dir, or --overwrite_output_dir to start anew"
            )
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
            if state.global_step >= last:  # the run ended before it saved the model
                self._load_from_checkpoint(checkpoint)
                self.state = state
                if self.average is not None:
                    self.average.start(self.model, checkpoint)
                    self.average.use(self.model)
                return True
        self.add_callback(CensusCallback(self))
        self.speed.flops, self.speed.peak = count_flops(args)
        self.train(resume_from_checkpoint=checkpoint)
        if self.termination.requested:
            self.end_terminated(f"at step {self.state.global_step}")
        return True

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            self.termination.restore()

    def end_terminated(self, where: str) -> NoReturn:
        """Ends the process after SIGTERM or Ctrl-C, with a message that says how to go on.

        Raises:
            SystemExit: With code 75 or 130.
        """
        print(f"{self.termination.word} {where}; {same_command(self.args)} goes on from there", file=sys.stderr)
        interrupted = self.termination.signal == signal.SIGINT
        raise SystemExit(INTERRUPTED_EXIT_CODE if interrupted else RESUMABLE_EXIT_CODE)

    def last_step(self) -> int:
        """The number of optimiser steps of the complete run."""
        args: Any = self.args
        if args.max_steps > 0:
            return args.max_steps
        return math.ceil(args.num_train_epochs * self.steps_per_epoch())

    def steps_per_epoch(self) -> int:
        """The number of optimiser steps of a pass over the data."""
        args: Any = self.args
        batches = len(self.train_dataset) / (args.train_batch_size * args.world_size)
        batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
        return max(math.ceil(batches / args.gradient_accumulation_steps), 1)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._trained = trainable_names(self.model)  # before an `UnfreezingCallback` freezes some
        if self.average is not None:
            self.average.start(self.model, resume_from_checkpoint)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        model = self.model if model is None else model
        if isinstance(model, MODELS):
            load_weights(model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not self.is_deepspeed_enabled:
            check_optimiser_state(checkpoint, self.is_fsdp_enabled)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled:  # without a second copy of the weights
            plugin = self.accelerator.state.fsdp_plugin
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
            if self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")
        else:
            super()._save_optimizer_and_scheduler(output_dir)
        if self.average is not None:
            self.average.save(output_dir, self.args.should_save)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.is_fsdp_enabled:  # complete, in one format, whatever the optimiser's format is
            weights = gather_weights(self.model)
            self._save(output_dir or self.args.output_dir, state_dict=weights)
        elif (
            self.is_deepspeed_enabled and self.deepspeed is not None
        ):  # `Trainer` takes a ValueError of saving for one
            weights = self.accelerator.get_state_dict(self.deepspeed)  # of gathering, and writes no weights
            self._save(output_dir or self.args.output_dir, state_dict=weights)
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not isinstance(self.model, MODELS) or self.processing_class is None:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder: Any = output_dir or self.args.output_dir
            trained = self._trained if getattr(self.args, "save_only_trainable", False) else None
            merged = getattr(self.args, "merge_lora_checkpoints", False) or not has_lora(self.model)
            if self._unfinished and (trained is not None or not merged):
                write_partial_checkpoint(folder, self.model, state_dict, trained)
                return
            write_model(folder, self.model, self.processing_class, self.provenance, state_dict)
            if self.provenance is not None:
                write_training_metadata(folder, self, self.provenance, self.changes)

    def _get_output_dir(self, trial) -> str:
        return self._unfinished or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        """Writes a checkpoint under another name first: one with its own name is complete.

        Raises:
            OSError: If it cannot be written. Earlier checkpoints are unchanged.
        """
        args: Any = self.args
        folder, name = Path(args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        unfinished = folder / UNFINISHED_FOLDER
        try:
            if args.should_save:
                shutil.rmtree(unfinished, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self._unfinished = str(unfinished)
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            # torch has no other class for a full disk
            if isinstance(error, RuntimeError) and not any(name in str(error) for name in TORCH_WRITERS):
                raise
            if args.should_save:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise OSError(
                f"{folder / name} could not be written: {error}; make room, and the same command goes on from the "
                "checkpoint before, if there is one"
            ) from error
        finally:
            self._unfinished = None
        self.accelerator.wait_for_everyone()
        if args.should_save:
            if self.state.best_model_checkpoint == str(unfinished / name):
                self.state.best_model_checkpoint = str(folder / name)
                self.state.save_to_json(str(unfinished / name / TRAINER_STATE_NAME))
            self.save_record(unfinished / name)
            shutil.rmtree(folder / name, ignore_errors=True)
            (unfinished / name).rename(folder / name)
            remove_old_checkpoints(folder, args.save_total_limit, self.state.best_model_checkpoint, unfinished)
            shutil.rmtree(unfinished)
        self.accelerator.wait_for_everyone()  # a scheduler may end all processes when the first one ends

    def save_record(self, folder: str | Path | None = None) -> None:
        """Writes `run.json`. In `output_dir` it says that the run has ended: it is the last file of a run.

        Args:
            folder: A checkpoint. The record then names its files and their sizes.
        """
        if self.args.should_save:
            record = {"steps": self.state.global_step, "settings": self.settings, "changes": self.changes}
            if isinstance(self.args, StageConfig):
                record["other_settings"] = self.args.other_settings()
            if folder is not None:
                record["files"] = list_files(Path(folder))
            write_json(Path(folder or self.args.output_dir or "") / RECORD_FILE, record)

    def _init_training_state(self, max_steps, *args, **kwargs):
        position = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)  # those of this run, not of the checkpoint
        return position

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training:
            set_train_mode(model)  # `Trainer.training_step` has put every part in training mode
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        self._skipped += self.count_images(inputs) * self.args.world_size
        self.speed.add_batch(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.divergence.add(loss, self.batch_names)
        self.accumulated = 0 if self.accelerator.sync_gradients else self.accumulated + 1
        return loss

    def get_batch_samples(self, epoch_iterator, *args, **kwargs):
        timed = TimedIterator(epoch_iterator)
        samples = super().get_batch_samples(timed, *args, **kwargs)
        self.speed.add_wait(timed.seconds)
        return samples

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        start = time.perf_counter()
        with self.averaged_weights(self.model):
            metrics = super().evaluate(*args, **kwargs)
        self.speed.pause(time.perf_counter() - start)
        return metrics

    def report(self, name: str, value: Any, step: int) -> None:
        """Sends a picture or a table of a validation to the trackers, see `trackers.report`."""
        report(self.callback_handler.callbacks, name, value, step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.means.read(self.accelerator) | self.speed.read(self.accelerator)
            if self._skipped:
                logs["images_skipped"] = self._skipped
        super().log(logs, start_time)

    def _issue_warnings_after_load(self, load_result) -> None:
        """Without the warning about tied weights: a checkpoint has them under one of their names only."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        missing = set(load_result.missing_keys)
        loaded = {id(parameter) for name, parameter in parameters.items() if name not in missing}
        not_loaded = [name for name in load_result.missing_keys if id(parameters.get(name)) not in loaded]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=not_loaded))
