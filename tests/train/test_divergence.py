"""A run stops before a step whose loss is not finite or has jumped, and says which images it was."""

import json
import math
from pathlib import Path

import pytest
import torch

from vlv import VLVForConditionalGeneration
from vlv.train import stage2
from vlv.train.checkpoints import last_checkpoint
from vlv.train.divergence import LossWatch
from vlv.train.stage2_trainer import Stage2Trainer

from .test_evaluating import arguments


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_with_the_model_before_it_and_the_names_of_the_images(
    tmp_path, image_folder, stage1_checkpoint, language_model, monkeypatch, capsys
):
    weights = {}
    compute_loss = Stage2Trainer.compute_loss

    def overflow(self, model, inputs, *args, **kwargs):
        loss = compute_loss(self, model, inputs, *args, **kwargs)
        if self.state.global_step == 2:
            weights.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
            loss = loss * math.inf
        return loss

    monkeypatch.setattr(Stage2Trainer, "compute_loss", overflow)
    inputs = {"model": stage1_checkpoint, "language_model": language_model, "pairs": image_folder}
    settings = {
        "save_strategy": "steps",
        "save_steps": 1,
        "learning_rate": 1e-2,
        "train_sampling_strategy": "sequential",
    }
    with pytest.raises(SystemExit) as stopped:
        stage2.main(arguments(tmp_path / "run", **inputs, **settings))
    assert stopped.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "the loss of step 3 is inf" in line]
    folder = tmp_path / "run" / "diverged-2"
    assert len(errors) == 1 and str(folder) in errors[0]
    record = json.loads((folder / "divergence.json").read_text())
    assert record["step"] == 2 and len(record["images"]) == 4
    assert all(Path(name).is_file() and name in errors[0] for name in record["images"])
    saved = VLVForConditionalGeneration.from_pretrained(folder)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in saved.state_dict().items())
    assert Path(last_checkpoint(tmp_path / "run")).name == "checkpoint-2"


@pytest.mark.parametrize(
    ("losses", "factor", "stops"),
    [
        ([1.0] * 30 + [10.1], 10, True),
        ([1.0] * 30 + [9.9], 10, False),
        ([1.0] * 30 + [1000.0], 0, False),
        ([1.0] * 5 + [1000.0], 10, False),  # too few losses to compare with
        ([1000.0] * 30 + [1.0] * 101 + [50.0], 10, True),  # the last 100 count
        ([1.0, math.nan], 0, True),
    ],
)
def test_a_loss_is_compared_with_the_median_of_the_last_steps(losses, factor, stops):
    watch = LossWatch(factor)
    assert [watch.check(loss) for loss in losses[:-1]] == [None] * (len(losses) - 1)
    assert (watch.check(losses[-1]) is not None) == stops
