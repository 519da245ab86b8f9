"""Several processes share the batches. Each has its own random numbers."""

import json
import os
from pathlib import Path

import pytest
import torch

from vlv.hub import TRAINING_FILE
from vlv.train import Stage2Config, Stage2Trainer, freeze_for_stage2

from ..interpreter import MODULE, run_python

ACCELERATE = ["accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1"]
ACCELERATE += ["--mixed_precision=no", "--dynamo_backend=no"]


@pytest.mark.slow
def test_accelerate_launches_a_training(tmp_path, image_folder, stable_diffusion, stage1_checkpoint):
    """With one process: it has no launcher of several for CPUs, which test_scale.py starts as torchrun does."""
    values = {
        "model": stage1_checkpoint,
        "diffusion_model": stable_diffusion,
        "images": image_folder,
        "output_dir": tmp_path / "run",
        "max_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "dataloader_num_workers": 0,
        "validation_steps": 0,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    config = tmp_path / "stage1.yaml"
    config.write_text("".join(f"{name}: {value}\n" for name, value in values.items()))
    command = [*ACCELERATE, "-m", "vlv.train.stage1", str(config), "--learning_rate=1e-3"]
    done = run_python(MODULE, command, cwd=Path.cwd(), env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert state["epoch"] == 2 * 4 / 16  # two steps saw this share of the sixteen images
    assert (tmp_path / "run" / "encoder" / "model.safetensors").is_file()
    metadata = json.loads((tmp_path / "run" / TRAINING_FILE).read_text())["stage1"]
    assert metadata["images"] == str(image_folder) and metadata["steps"] == 2 and metadata["learning_rate"] == 1e-3
    assert metadata["batch_size"] == 4 and metadata["final_loss"] > 0


def first_random_number(rank, tmp_path, monkeypatch, captioner, processor, images) -> float:
    """The first random number in the first training step of a process with this rank."""
    monkeypatch.setattr(Stage2Config, "process_index", property(lambda self: rank))
    numbers = []

    class RecordingTrainer(Stage2Trainer):
        def compute_loss(self, *args, **kwargs):
            numbers.append(torch.rand(()).item())
            return super().compute_loss(*args, **kwargs)

    config = Stage2Config(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=1,
        dataloader_num_workers=0,
        save_strategy="no",
        validation_steps=0,
        use_cpu=True,
        disable_tqdm=True,
    )
    freeze_for_stage2(captioner, "projector")
    RecordingTrainer(captioner, config, [{"image": images[0], "caption": "a dog"}], processor).train()
    return numbers[0]


@pytest.mark.slow
def test_each_process_has_its_own_random_numbers(tmp_path, monkeypatch, captioner, processor, images):
    shared = (tmp_path, monkeypatch, captioner, processor, images)
    first, second, again = (first_random_number(rank, *shared) for rank in (0, 1, 0))
    assert first != second and first == again
