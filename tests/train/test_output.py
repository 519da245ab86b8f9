"""`vlv train` prints what a person can read: log lines or one progress bar, and no warnings of libraries."""

import json
import os
import pty
import subprocess
import time
from pathlib import Path

import pytest
import torch

from vlv.train import Stage1Config, Stage2Config

from ..interpreter import MODULE, PythonProcess, run_python


def command(stage: str, output_dir: Path, **inputs) -> list[str]:
    values = {
        "output_dir": output_dir,
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
    return [f"vlv.train.{stage}", *(f"--{name}={value}" for name, value in values.items())]


RUNS = (
    "import json, sys; from vlv.train import stage2; [stage2.main(arguments) for arguments in json.loads(sys.argv[1])]"
)


@pytest.mark.slow
def test_without_a_terminal_it_prints_log_lines_and_no_warnings(
    tmp_path, image_folder, stage1_checkpoint, language_model
):
    """Also when it resumes, where tied weights are in the checkpoint once, and on a machine without an accelerator."""
    inputs = {"model": stage1_checkpoint, "language_model": language_model, "pairs": image_folder}
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    _, *arguments = command("stage2", tmp_path / "run", **inputs)
    runs = [arguments, [*arguments, "--max_steps=3"]]
    done = run_python(RUNS, [json.dumps(runs)], cwd=Path.cwd(), env=environment, with_libraries=False)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "Warning" not in output and "missing keys" not in output and "it/s" not in output, output
    assert "use_cache" not in output, output
    assert "resuming from" in output and "'loss'" in output and "'images_per_second'" in output
    assert "'learning_rate'" in output


@pytest.mark.slow
def test_in_a_terminal_it_shows_one_progress_bar_with_loss_and_speed(
    tmp_path, image_folder, stage1_checkpoint, stable_diffusion
):
    inputs = {"model": stage1_checkpoint, "diffusion_model": stable_diffusion, "images": image_folder}
    arguments = [*command("stage1", tmp_path / "run", **inputs), "--use_cpu"]
    terminal, child_side = pty.openpty()
    subprocess.run(["stty", "rows", "40", "cols", "120"], stdin=child_side, check=True)
    device = os.ttyname(child_side)
    process = PythonProcess(MODULE, arguments, stdout=device, stderr=device)
    os.set_blocking(terminal, False)
    output = b""
    while True:
        ended = process.poll() is not None
        try:
            output += os.read(terminal, 65536)
        except BlockingIOError:
            if ended:
                break
            time.sleep(0.02)
    os.close(child_side)
    text = output.decode()
    assert process.wait() == 0, text
    last = [line for line in text.replace("\r", "\n").splitlines() if line.startswith("training:")][-1]
    assert "2/2" in last and "loss=" in last and "images/s=" in last
    assert "Warning" not in text and "'loss'" not in text
    assert "Loading weights" not in text and "Writing model shards" not in text


@pytest.mark.parametrize("config", [Stage1Config, Stage2Config])
def test_memory_is_pinned_only_with_an_accelerator(config, tmp_path):
    assert config(output_dir=str(tmp_path)).dataloader_pin_memory == torch.accelerator.is_available()


def test_there_are_no_more_workers_than_cpus_unless_it_is_asked_for(tmp_path, monkeypatch):
    for cpus, expected in ((2, 2), (64, 4)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cpus=cpus: set(range(cpus)), raising=False)
        assert Stage1Config(output_dir=str(tmp_path)).dataloader_num_workers == expected
        assert Stage1Config(output_dir=str(tmp_path), dataloader_num_workers=8).dataloader_num_workers == 8


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
@pytest.mark.filterwarnings("error")
def test_both_names_of_activation_checkpointing_turn_it_on(name, tmp_path):
    assert Stage1Config(output_dir=str(tmp_path), **{name: True}).activation_checkpointing is True
    assert Stage1Config(output_dir=str(tmp_path), **{name: False}).activation_checkpointing is False
