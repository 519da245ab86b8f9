"""`vlv train` prints what a person can read: log lines or one progress bar, and no warnings of libraries."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vlv.train import Stage1Config, Stage2Config

from ..interpreter import MODULE, run_python


@pytest.fixture(params=["stage1", "stage2"])
def command(request, tmp_path, image_folder, stable_diffusion, stage1_checkpoint, language_model) -> list[str]:
    if request.param == "stage1":
        inputs = {"diffusion_model": stable_diffusion, "images": image_folder}
    else:
        inputs = {"language_model": language_model, "pairs": image_folder}
    values = {
        "model": stage1_checkpoint,
        "output_dir": tmp_path / "run",
        "max_steps": 2,
        "logging_steps": 1,
        "save_steps": 1,
        "validation_steps": 1,
        "num_validation_images": 2,
        "per_device_train_batch_size": 4,
        "dataloader_num_workers": 1,
        "gradient_checkpointing": True,
        **inputs,
    }
    return [sys.executable, "-m", f"vlv.train.{request.param}", *(f"--{k}={v}" for k, v in values.items())]


@pytest.mark.slow
def test_without_a_terminal_it_prints_log_lines_and_no_warnings(command):
    """Also when it resumes, where tied weights are in the checkpoint once, and on a machine without an accelerator."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    for arguments in ([], ["--max_steps=3"]):
        done = run_python(MODULE, [*command[2:], *arguments], cwd=Path.cwd(), env=environment)
        output = done.stdout + done.stderr
        assert done.returncode == 0, output
        assert "Warning" not in output and "missing keys" not in output and "it/s" not in output, output
        assert "use_cache" not in output, output
    assert "resuming from" in output and "'loss'" in output and "'images_per_second'" in output
    assert "'learning_rate'" in output


@pytest.mark.slow
def test_in_a_terminal_it_shows_one_progress_bar_with_loss_and_speed(command):
    terminal, child_side = pty.openpty()
    os.set_blocking(terminal, True)
    subprocess.run(["stty", "rows", "40", "cols", "120"], stdin=child_side, check=True)
    process = subprocess.Popen([*command, "--use_cpu"], stdout=child_side, stderr=child_side)
    os.close(child_side)
    output = b""
    while True:
        try:
            block = os.read(terminal, 65536)
        except OSError:  # Linux's end of file, when the process has closed its side
            break
        if not block:
            break
        output += block
    text = output.decode()
    assert process.wait() == 0, text
    last = [line for line in text.replace("\r", "\n").splitlines() if line.startswith("training:")][-1]
    assert "2/2" in last and "loss=" in last and "images/s=" in last
    assert "Warning" not in text and "'loss'" not in text
    assert "Loading weights" not in text and "Writing model shards" not in text


@pytest.mark.parametrize("config", [Stage1Config, Stage2Config])
def test_memory_is_pinned_only_with_an_accelerator(config, tmp_path):
    assert config(output_dir=str(tmp_path)).dataloader_pin_memory == torch.accelerator.is_available()


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
@pytest.mark.filterwarnings("error")
def test_both_names_of_activation_checkpointing_turn_it_on(name, tmp_path):
    assert Stage1Config(output_dir=str(tmp_path), **{name: True}).activation_checkpointing is True
    assert Stage1Config(output_dir=str(tmp_path), **{name: False}).activation_checkpointing is False
