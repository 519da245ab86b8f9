"""Several processes share the work, each with noise of its own."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import TrainerControl, TrainerState

from vlv.hub import TRAINING_FILE
from vlv.train import PerProcessSeedCallback, Stage1Config

ACCELERATE = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1"]
ACCELERATE += ["--mixed_precision=no", "--dynamo_backend=no"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]  # accelerate has no launcher for CPUs


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "processes"), [(ACCELERATE, 1), (TORCHRUN, 2)], ids=["accelerate", "torchrun"])
def test_launchers(launcher, processes, tmp_path, image_folder, stable_diffusion, stage1_checkpoint):
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
    command = [sys.executable, *launcher, "-m", "vlv.train.stage1", str(config), "--learning_rate=1e-3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert state["epoch"] == processes * 2 * 4 / 16  # the share of the sixteen images that two steps saw
    assert (tmp_path / "run" / "model.safetensors").is_file()
    facts = json.loads((tmp_path / "run" / TRAINING_FILE).read_text())["stage1"]
    assert facts["images"] == str(image_folder) and facts["steps"] == 2 and facts["learning_rate"] == 1e-3
    assert facts["batch_size"] == 4 * processes and facts["final_loss"] > 0


def test_processes_draw_different_noise(tmp_path):
    draws = []
    for rank in (0, 1, 0):

        class Arguments:
            seed, process_index = 42, rank

        PerProcessSeedCallback().on_train_begin(Arguments(), TrainerState(), TrainerControl())
        draws.append(torch.randn(4))
    assert not torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[2])
    assert Stage1Config(output_dir=str(tmp_path), use_cpu=True).process_index == 0
