"""Validations reach the trackers of `report_to`; a tracker that is not installed is named."""

import importlib.util
import json
import sqlite3
from pathlib import Path

import pytest
from PIL import Image
from transformers import TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback, TrackioCallback

from vlv.train import Stage2Config
from vlv.train.trackers import check_trackers, report

ROWS = [{"generated": "a dog", "reference": "a | cat", "token_f1": 0.5}]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio_gets_pictures_captions_and_losses(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported, which is here
    monkeypatch.setenv("TRACKIO_AUTO_LOG_CPU", "0")
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


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_gets_pictures_and_captions(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    Image.new("RGB", (4, 2), "red").save(tmp_path / "grid.png")
    with SummaryWriter(str(tmp_path)) as writer:
        callback = TensorBoardCallback(writer)
        report([callback], "grid", tmp_path / "grid.png", 3)
        report([callback], "captions", ROWS, 3)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert (events.Images("grid")[0].width, events.Images("grid")[0].step) == (4, 3)
    assert "a dog" in events.Tensors("captions/text_summary")[0].tensor_proto.string_val[0].decode()


def test_a_tracker_that_is_not_installed_is_an_error_with_its_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"report_to is 'comet_ml', .* package comet-ml \(pip install comet-ml\)"):
        check_trackers(["comet_ml"])
