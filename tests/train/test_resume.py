"""A killed run, resumed, goes on as if nothing had happened; the frozen decoder comes out as it went in."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vlv import VLVModel
from vlv.train.stage1 import Stage1Config, build_stage1
from vlv.train.trainer import last_checkpoint

STEPS, KILLED_AT, SAVED_EVERY = 12, 4, 4


def settings(stage: str, output_dir: Path, **inputs) -> list[str]:
    values = {
        "output_dir": output_dir,
        "max_steps": STEPS,
        "save_steps": SAVED_EVERY,
        "logging_steps": 1,
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-3,
        "dataloader_num_workers": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "validation_steps": 5,
        "num_validation_images": 2,
        **inputs,
    }
    return [sys.executable, "-m", f"vlv.train.{stage}", *(f"--{k}={v}" for k, v in values.items())]


def losses(folder: Path) -> dict[int, float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {row["step"]: row["loss"] for row in history if "loss" in row}


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def run_until_killed(command: list[str], output_dir: Path) -> None:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    state = output_dir / f"checkpoint-{KILLED_AT}" / "trainer_state.json"
    while not state.exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (output_dir / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_killed_run_resumes_with_the_same_losses(
    stage, tmp_path, image_folder, stable_diffusion, stage1_checkpoint, language_model
):
    if stage == "stage1":
        inputs = {
            "model": stage1_checkpoint,
            "diffusion_model": stable_diffusion,
            "images": image_folder,
            "trainable": "all",
        }
    else:
        inputs = {"model": stage1_checkpoint, "language_model": language_model, "pairs": image_folder}
    run(settings(stage, tmp_path / "unbroken", **inputs))
    broken = settings(stage, tmp_path / "broken", **inputs)
    run_until_killed(broken, tmp_path / "broken")
    run(broken)

    unbroken = losses(tmp_path / "unbroken")
    assert list(unbroken) == list(range(1, STEPS + 1))
    assert len(set(unbroken.values())) > STEPS // 2
    assert losses(tmp_path / "broken") == unbroken
    assert list((tmp_path / "unbroken" / "samples").iterdir())


def digest(module: torch.nn.Module) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        total.update(name.encode() + tensor.numpy().tobytes())
    return total.hexdigest()


def test_training_changes_the_encoder_and_no_byte_of_what_is_frozen(
    tmp_path, image_folder, stable_diffusion, stage1_checkpoint
):
    config = Stage1Config(
        output_dir=str(tmp_path),
        model=str(stage1_checkpoint),
        diffusion_model=str(stable_diffusion),
        images=str(image_folder),
        trainable="all",
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        dataloader_num_workers=0,
        validation_steps=0,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = build_stage1(config)
    model = trainer.model
    decoder_before, text_encoder_before = digest(trainer.decoder), digest(model.text_encoder)
    learning_before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()

    assert digest(trainer.decoder) == decoder_before
    assert digest(model.text_encoder) == text_encoder_before
    frozen = [*trainer.decoder.parameters(), *model.text_encoder.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in frozen)
    changed = [
        name for name, p in model.named_parameters() if name in learning_before and not p.equal(learning_before[name])
    ]
    assert len(changed) == len(learning_before)
    model.train()
    trainer.decoder.train()
    assert not model.text_encoder.training and not trainer.decoder.unet.training
    trainer.save_model()
    assert not [name for name in VLVModel.from_pretrained(tmp_path).state_dict() if "unet" in name or "vae" in name]


def test_a_checkpoint_whose_writing_was_cut_short_is_not_taken(tmp_path):
    for step, state in ((4, '{"global_step": 4}'), (8, '{"global_'), (12, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert last_checkpoint(tmp_path / "none") is None
