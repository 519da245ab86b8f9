"""The base class of both trainers."""

import time
from pathlib import Path

import torch
from transformers import ProgressCallback, Trainer

from vlv.files import read_json

from .callbacks import PerProcessSeedCallback, ProgressBarCallback
from .modes import set_train_mode


class VLVTrainer(Trainer):
    """A `Trainer` that keeps frozen parts in evaluation mode and logs its speed.

    It logs `images_per_second`, of all processes together, and `images_skipped`, the number of unreadable images so
    far, if there were any.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(PerProcessSeedCallback())
        if self.pop_callback(ProgressCallback) is not None:  # absent with disable_tqdm and in notebooks
            self.add_callback(ProgressBarCallback())
        self._images, self._skipped, self._since = 0, 0, time.perf_counter()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training:
            set_train_mode(model)  # `Trainer.training_step` has put every part in training mode
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

    def _issue_warnings_after_load(self, load_result) -> None:
        """Without the warning about tied weights: a checkpoint has them under one of their names only."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        missing = set(load_result.missing_keys)
        loaded = {id(parameter) for name, parameter in parameters.items() if name not in missing}
        not_loaded = [name for name in load_result.missing_keys if id(parameters.get(name)) not in loaded]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=not_loaded))


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest complete `checkpoint-N` in a folder, or None. Prints which one it is.

    A checkpoint is complete if its `trainer_state.json` is, which `Trainer` writes last.
    """
    complete = [path.parent for path in Path(folder).glob("checkpoint-*/trainer_state.json") if _is_complete(path)]
    newest = max(complete, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)
    if newest is not None:
        print(f"resuming from {newest}", flush=True)
    return None if newest is None else str(newest)


def _is_complete(state: Path) -> bool:
    """Whether a `trainer_state.json` was written to its end: a killed run can leave a part of it."""
    try:
        return "global_step" in read_json(state)
    except ValueError:
        return False
