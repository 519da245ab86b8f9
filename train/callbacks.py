"""What a person wants to see while training: how fast it goes, and what the model makes of some images by now."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import TrainerCallback, set_seed


class PerProcessSeedCallback(TrainerCallback):
    """Gives each process its own random numbers; `Trainer` gives all the same, and so the same noise to all images.

    When training begins the order of the data is settled, and what a resumed run restores is yet to come.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        set_seed(args.seed + args.process_index)


class ValidationCallback(TrainerCallback):
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


def side_by_side(originals: list[Image.Image], pictures: list[Image.Image]) -> Image.Image:
    """One sheet: originals in the upper row, pictures below."""
    width, height = pictures[0].size
    sheet = Image.new("RGB", (width * len(originals), 2 * height), "white")
    for column, (original, picture) in enumerate(zip(originals, pictures, strict=True)):
        sheet.paste(original.resize((width, height)), (column * width, 0))
        sheet.paste(picture, (column * width, height))
    return sheet
