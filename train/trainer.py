"""The trainer that both stages build on."""

import time
from pathlib import Path

import torch
from transformers import Trainer

from vlv.files import read_json

from .callbacks import PerProcessSeedCallback
from .modes import set_train_mode


class VLVTrainer(Trainer):
    """A `Trainer` that logs `images_per_second`, and `images_skipped` where images could not be read."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(PerProcessSeedCallback())
        self._images, self._skipped, self._since = 0, 0, time.perf_counter()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training:
            set_train_mode(model)  # `Trainer.training_step` has put all of it in training mode
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        self._skipped += inputs.pop("num_skipped", 0) * self.args.world_size
        self._images += len(inputs["pixel_values"]) * self.args.world_size
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            now = time.perf_counter()
            logs["images_per_second"] = round(self._images / max(now - self._since, 1e-9), 2)
            self._images, self._since = 0, now
            if self._skipped:
                logs["images_skipped"] = self._skipped
        super().log(logs, start_time)


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest `checkpoint-N` that was written to its end: `Trainer` writes `trainer_state.json` last."""
    complete = [path.parent for path in Path(folder).glob("checkpoint-*/trainer_state.json") if _is_whole(path)]
    newest = max(complete, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)
    if newest is not None:
        print(f"going on from {newest}", flush=True)
    return None if newest is None else str(newest)


def _is_whole(state: Path) -> bool:
    """Whether a run was not killed while it wrote this file."""
    try:
        return "global_step" in read_json(state)
    except ValueError:
        return False
