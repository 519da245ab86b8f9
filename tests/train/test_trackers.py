"""Validations reach the trackers of `report_to`; a tracker that is not installed is named."""

import html
import importlib.util
import json
import re
import sqlite3
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback, TrackioCallback

from vlv.train import Stage2Config, stage1_trainer
from vlv.train.trackers import check_trackers, report

from .two_processes import losses, trainer_of

ROWS = [{"generated": "a dog", "reference": "a | cat\nand more", "token_f1": 0.5}]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio_gets_pictures_captions_and_losses(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("TRACKIO_AUTO_LOG_CPU", "0")
    # trackio reads both when it is imported, which any test before may have done: it is imported anew here.
    for name in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    picture = tmp_path / "grid.png"
    Image.linear_gradient("L").convert("RGB").save(picture)
    tracker, state, control = TrackioCallback(), TrainerState(global_step=3), TrainerControl()
    config = Stage2Config(output_dir=str(tmp_path / "run"), project="miniature", report_to="trackio", use_cpu=True)
    tracker.on_train_begin(config, state, control)
    tracker.on_log(config, state, control, logs={"loss": 2.0, "eval_loss": 3.0, "data_wait_share": 0.5})
    report([tracker], "validation/reconstructions", picture, 3)
    report([tracker], "validation/captions", ROWS, 3)
    tracker.on_train_end(config, state, control)
    with sqlite3.connect(next((tmp_path / "trackio").glob("miniature*.db"))) as database:
        rows = database.execute("select metrics from metrics order by id")
        logs = {name: value for row in rows for name, value in json.loads(row[0]).items()}
    assert logs["train/loss"] == 2 and logs["eval/loss"] == 3 and logs["train/data_wait_share"] == 0.5
    assert logs["validation/captions"]["_value"] == ROWS and logs["train/global_step"] == 3
    stored = next((tmp_path / "trackio").rglob(Path(logs["validation/reconstructions"]["file_path"]).name))
    with Image.open(stored) as logged, Image.open(picture) as written:
        assert logged.convert("RGB").tobytes() == written.tobytes()


def trained(stage: int, folder: Path, tracker: str, monkeypatch) -> tuple[list[float], Path]:
    """The losses of a training of two steps, and the file of its last validation."""
    monkeypatch.setattr(stage1_trainer, "VALIDATION_INFERENCE_STEPS", 2)
    settings: dict[str, Any] = {"report_to": tracker, "max_steps": 2, "validation_steps": 1, "save_strategy": "no"}
    trainer = trainer_of(stage, folder, **settings)
    trainer.train()
    return losses(trainer), folder / "samples" / f"step-0000002.{'png' if stage == 1 else 'json'}"


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_tensorboard_gets_losses_pictures_and_captions_of_a_training(tmp_path, monkeypatch, stage):
    expected, sample = trained(stage, tmp_path, "tensorboard", monkeypatch)
    events = EventAccumulator(str(next(tmp_path.glob("runs/*"))))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(expected, rel=1e-6)
    assert [event.step for event in events.Scalars("train/images_per_second")] == [1, 2]
    if stage == 1:
        first, last = events.Images("validation/reconstructions")
        assert (first.step, last.step) == (1, 2)
        with Image.open(BytesIO(last.encoded_image_string)) as logged, Image.open(sample) as written:
            assert logged.convert("RGB").tobytes() == written.convert("RGB").tobytes()
    else:
        table = markdown_to_safe_html(events.Tensors("validation/captions/text_summary")[1].tensor_proto.string_val[0])
        for row in json.loads(sample.read_text()):
            assert all(f">{html.escape(str(value))}<" in table for value in row.values())
        assert len(events.Scalars("train/validation_token_f1")) == 2


def test_tables_of_tensorboard_keep_cells_with_bars_and_line_breaks_whole(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        report([TensorBoardCallback(writer)], "captions", ROWS, 3)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    table = markdown_to_safe_html(events.Tensors("captions/text_summary")[0].tensor_proto.string_val[0])
    assert re.findall("<td>(.*?)</td>", table) == ["a dog", "a | cat and more", "0.5"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
@pytest.mark.parametrize("stage", [1, 2])
def test_wandb_keeps_losses_pictures_and_captions_of_a_training_in_its_offline_folder(tmp_path, monkeypatch, stage):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    expected, sample = trained(stage, tmp_path / "run", "wandb", monkeypatch)
    folder, logged = Path(wandb.run.dir), dict(wandb.run.summary)
    wandb.finish()
    assert logged["train/loss"] == pytest.approx(expected[-1], rel=1e-6) and logged["train/global_step"] == 2
    name = "validation/reconstructions" if stage == 1 else "validation/captions"
    stored = folder / logged[name]["path"]
    if stage == 1:
        with Image.open(stored) as picture, Image.open(sample) as written:
            assert picture.convert("RGB").tobytes() == written.convert("RGB").tobytes()
    else:
        table = json.loads(stored.read_text())
        rows = json.loads(sample.read_text())
        assert table["columns"] == list(rows[0]) and table["data"] == [list(row.values()) for row in rows]


def test_a_tracker_that_is_not_installed_is_an_error_with_its_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"report_to is 'comet_ml', .* package comet-ml \(pip install comet-ml\)"):
        check_trackers(["comet_ml"])
