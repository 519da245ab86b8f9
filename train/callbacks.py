"""What a person wants to see while training: how fast it goes, and what the model makes of some images by now."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import Trainer, TrainerCallback, set_seed

from vlv.files import read_json


class ThroughputTrainer(Trainer):
    """A `Trainer` that logs `images_per_second`, and `images_skipped` where images could not be read."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(SeedOfItsOwn())
        self._images, self._skipped, self._since = 0, 0, time.perf_counter()

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


class SeedOfItsOwn(TrainerCallback):
    """Gives each process its own random numbers; `Trainer` gives all the same, and so the same noise to all images.

    When training begins the order of the data is settled, and what a resumed run restores is yet to come.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        set_seed(args.seed + args.process_index)


class SampleCallback(TrainerCallback):
    """Every `every` steps calls `draw(model, step, folder)` on the first process; random state and mode are kept."""

    def __init__(self, draw: Callable[[Any, int, Path], None], every: int):
        self.draw, self.every = draw, every

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.every <= 0 or state.global_step % self.every or not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        was_training, random_state = model.training, torch.get_rng_state()
        try:
            with torch.no_grad():
                self.draw(model.eval(), state.global_step, folder)
        finally:
            model.train(was_training)
            torch.set_rng_state(random_state)


def readable_items(dataset: Any, count: int, load: Callable[[Any], Any]) -> list[dict]:
    """The first `count` items whose image can be read; at most ten times as many are tried."""
    items: list[dict] = []
    for index in range(min(10 * count, len(dataset))):
        if len(items) == count:
            break
        item = dataset[index]
        try:
            load(item["image"])
        except ValueError:
            continue
        items.append(item)
    return items


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


def side_by_side(originals: list[Image.Image], pictures: list[Image.Image]) -> Image.Image:
    """One sheet: originals in the upper row, pictures below."""
    width, height = pictures[0].size
    sheet = Image.new("RGB", (width * len(originals), 2 * height), "white")
    for column, (original, picture) in enumerate(zip(originals, pictures, strict=True)):
        sheet.paste(original.resize((width, height)), (column * width, 0))
        sheet.paste(picture, (column * width, height))
    return sheet


def write_json(path: Path, value: Any) -> None:
    """UTF-8, indented."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
