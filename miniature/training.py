"""Training of the miniature's parts: averaged weights, and one function that trains any of them.

Each part is a small module whose `forward` returns its own loss. `transformers.Trainer` does the rest: schedule,
checkpoints, resuming, and data-parallel training (`torchrun --nproc_per_node 2`).
"""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from vlv.train import PerProcessSeedCallback, last_checkpoint

DEVICES = ("cpu", "cuda")
_device = "cpu"


def use_device(device: str) -> None:
    """Chooses where the trainers of this process compute. On the CPU, a process has one thread.

    Raises:
        ValueError: If there is no such device.
    """
    global _device
    if device not in DEVICES or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device is {device!r}; expected 'cpu', or 'cuda' on a machine where PyTorch finds a GPU")
    _device = device
    torch.set_num_threads(1 if device == "cpu" else os.cpu_count() or 1)


def hardware_arguments() -> dict[str, Any]:
    """Arguments of every trainer, for the device of `use_device`: by default the CPU."""
    return {
        "use_cpu": _device == "cpu",
        "dataloader_num_workers": 0 if _device == "cpu" else min(12, os.cpu_count() or 1),
        "dataloader_drop_last": True,
        "ddp_find_unused_parameters": False,
        "disable_tqdm": True,
        "save_total_limit": 1,
    }


class MovingAverageCallback(TrainerCallback):
    """Keeps an exponential moving average of a module's weights in `average`, and saves it in each checkpoint.

    The average stays where the module was at first, also if a trainer then moves the module to a GPU.
    """

    def __init__(self, module: nn.Module, decay: float = 0.999, warmup: int = 20):
        self.module, self.decay, self.warmup = module, decay, warmup
        self.average: Any = copy.deepcopy(module).requires_grad_(False).eval()

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:
            saved = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "average.pt"
            self.average.load_state_dict(torch.load(saved, weights_only=True))

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        decay = min(self.decay, (1 + state.global_step) / (self.warmup + state.global_step))
        averages = dict(self.average.named_parameters())
        for name, parameter in self.module.named_parameters():
            averages[name].lerp_(parameter.float().to(averages[name].device), 1 - decay)
        for name, buffer in self.module.named_buffers():
            self.average.get_buffer(name).copy_(buffer)

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            torch.save(self.average.state_dict(), folder / "average.pt")


def per_process_batch_size(batch_size: int) -> int:
    """The part of a batch that each process trains on, under `torchrun` or alone."""
    return batch_size // int(os.environ.get("WORLD_SIZE", "1"))


def train_module(
    module: nn.Module,
    dataset: Dataset,
    output_dir: str | Path,
    *,
    batch_size: int,
    learning_rate: float,
    data_collator=None,
    seed: int = 0,
    callbacks: tuple[TrainerCallback, ...] = (),
    **arguments,
) -> None:
    """Trains a module that returns `{"loss": ...}` for one pass over `dataset`. An interrupted run resumes.

    Args:
        module: Called with the collated batch as keyword arguments.
        output_dir: For checkpoints. If it has one, training resumes from it.
        batch_size: Of all processes together.
        callbacks: For example a `MovingAverageCallback` of a part of `module`.
        arguments: Arguments of `TrainingArguments`. They replace the defaults below.
    """
    set_seed(seed)
    settings = hardware_arguments() | {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": per_process_batch_size(batch_size),
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 100,
        "weight_decay": 0.01,
        "adam_beta2": 0.99,
        "max_grad_norm": 1.0,
        "num_train_epochs": 1,
        "logging_steps": 50,
        "save_steps": 250,
        "remove_unused_columns": False,
        "report_to": "none",
        "seed": seed,
        "data_seed": seed,
        **arguments,
    }
    trainer = Trainer(
        model=module,
        args=TrainingArguments(**settings),
        train_dataset=dataset,
        data_collator=data_collator,
        callbacks=[*callbacks, PerProcessSeedCallback()],
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(output_dir))
