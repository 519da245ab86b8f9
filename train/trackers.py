"""Pictures and captions of validations in the trackers of `report_to`: trackio, TensorBoard, W&B."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

TRACKER_PACKAGES = {
    **{name: (name, name) for name in ("trackio", "tensorboard", "wandb", "mlflow", "clearml", "dvclive", "swanlab")},
    "comet_ml": ("comet_ml", "comet-ml"),
    "codecarbon": ("codecarbon", "codecarbon"),
}
"""Module and package of the trackers of `report_to`."""

Rows = Sequence[dict[str, Any]]


def check_trackers(names: Sequence[str]) -> None:
    """Checks that the packages of trackers are installed.

    Raises:
        ValueError: If one is not.
    """
    for name in names:
        module, package = TRACKER_PACKAGES.get(name, (None, None))
        if module is not None and importlib.util.find_spec(module) is None:
            raise ValueError(
                f"report_to is {name!r}, which needs the package {package} (pip install {package}); or leave it out"
            )


def report(callbacks: Sequence[Any], name: str, value: Path | Rows, step: int) -> None:
    """Sends a picture or a table of a validation to all trackers of a run that know such.

    Args:
        callbacks: Of the trainer; those of trackers are among them.
        name: What the trackers call it.
        value: The file of a picture, or the rows of a table.
        step: The optimiser step.
    """
    for callback in callbacks:
        for kind, send in TRACKERS.items():
            if isinstance(callback, kind):
                send(callback, name, value, step)


def _trackio(callback: Any, name: str, value: Path | Rows, step: int) -> None:
    trackio = callback._trackio
    shown = trackio.Image(str(value)) if isinstance(value, Path) else trackio.Table(**_columns(value))
    trackio.log({name: shown, "train/global_step": step})


def _tensorboard(callback: Any, name: str, value: Path | Rows, step: int) -> None:
    if isinstance(value, Path):
        with Image.open(value) as picture:
            callback.tb_writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
    else:
        table = _columns(value)
        lines = [table["columns"], ["---"] * len(table["columns"]), *table["data"]]
        text = "\n".join("| " + " | ".join(_markdown_cell(cell) for cell in line) + " |" for line in lines)
        callback.tb_writer.add_text(name, text, step)


def _markdown_cell(value: Any) -> str:
    return str(value).replace("\n", " ").replace("|", "\\|")


def _wandb(callback: Any, name: str, value: Path | Rows, step: int) -> None:
    wandb = callback._wandb
    shown = wandb.Image(str(value)) if isinstance(value, Path) else wandb.Table(**_columns(value))
    wandb.log({name: shown, "train/global_step": step})


def _columns(rows: Rows) -> dict[str, list]:
    columns = list(rows[0])
    return {"columns": columns, "data": [[row[column] for column in columns] for row in rows]}


TRACKERS: dict[type, Callable[[Any, str, Path | Rows, int], None]] = {
    TrackioCallback: _trackio,
    TensorBoardCallback: _tensorboard,
    WandbCallback: _wandb,
}
