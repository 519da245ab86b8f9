"""What every part of the recipe shares: endless rendered scenes as a dataset, averaged weights, and one way to train.

Each part is a small module whose `forward` returns its own loss, so that `transformers.Trainer` does the rest:
schedule, checkpoints, resuming, and data-parallel training (`torchrun --nproc_per_node 2`).
"""

import copy
import os
import random
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from vlv.train import PerProcessSeedCallback, last_checkpoint

from .grammar import write_caption
from .render import render
from .world import Scene, sample_scenes

EVALUATION_SEED = 1_000_003
ON_THIS_MACHINE: dict[str, Any] = {  # settings of every trainer: processes of one thread each, no accelerator
    "use_cpu": True,
    "dataloader_num_workers": 0,
    "dataloader_drop_last": True,
    "ddp_find_unused_parameters": False,
    "disable_tqdm": True,
    "save_total_limit": 1,
}


class SceneDataset(Dataset):
    """`length` scenes of a split, each drawn, rendered and described from its own number, so that any can be remade.

    Items hold `pixels`, a `(3, 64, 64)` uint8 tensor, `scene`, and `caption`; `fields` chooses which. Of a share
    `partial` of the scenes the caption leaves out each object, and the background, with even chance.
    """

    def __init__(
        self,
        length: int,
        split: str | None = "train",
        seed: int = 0,
        fields: tuple[str, ...] = ("pixels",),
        partial: float = 0.0,
    ):
        self.length, self.split, self.seed, self.fields, self.partial = length, split, seed, fields, partial

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.length:
            raise IndexError(index)
        rng = random.Random(f"{self.seed}/{self.split}/{index}")
        scene = next(sample_scenes(rng, self.split))
        item: dict = {}
        if "pixels" in self.fields:
            item["pixels"] = torch.from_numpy(render(scene, rng)).permute(2, 0, 1)
        if "caption" in self.fields:
            told = leave_out(scene, rng) if rng.random() < self.partial else scene
            item["caption"] = write_caption(told, rng)
        if "scene" in self.fields:
            item["scene"] = scene
        return item


def leave_out(scene: Scene, rng: random.Random) -> Scene:
    """The scene less some of its objects, and perhaps its background: what a careless caption tells of it."""
    objects = tuple(o for o in scene.objects if rng.random() < 0.5)
    return Scene(scene.background if rng.random() < 0.5 else None, objects)


class MovingAverage(TrainerCallback):
    """Keeps an exponential moving average of a module's trained weights beside the checkpoints."""

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
            averages[name].lerp_(parameter.float(), 1 - decay)
        for name, buffer in self.module.named_buffers():
            self.average.get_buffer(name).copy_(buffer)

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            torch.save(self.average.state_dict(), folder / "average.pt")


def share_of(batch_size: int) -> int:
    """What each process takes of a batch, under `torchrun` or alone."""
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
    """Trains a module that returns `{"loss": ...}` on one pass over `dataset`, resuming where it stopped.

    Args:
        module: Called with the collated batch as keyword arguments.
        batch_size: Of all processes together.
        callbacks: Such as a `MovingAverage` of a part of `module`.
        arguments: Of `TrainingArguments`, over the defaults here.
    """
    set_seed(seed)
    settings = ON_THIS_MACHINE | {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": share_of(batch_size),
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
