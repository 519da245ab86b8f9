"""A killed run that is resumed has the losses of an unbroken run. Training does not change frozen parts."""

import hashlib
import json
import time
from pathlib import Path

import pytest
import torch

from vlv import VLVModel
from vlv.diffusion_decoder import load_diffusion_decoder
from vlv.train import stage1

from ..interpreter import MODULE, PythonProcess

STEPS, KILLED_AT, SAVED_EVERY = 6, 2, 2


def settings(output_dir: Path, **inputs) -> list[str]:
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
        "validation_steps": 3,
        "num_validation_images": 2,
        **inputs,
    }
    return [f"--{name}={value}" for name, value in values.items()]


def losses(folder: Path) -> dict[int, float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {row["step"]: row["loss"] for row in history if "loss" in row}


def run_until_killed(stage: str, arguments: list[str], output_dir: Path) -> None:
    log = output_dir.with_suffix(".log")
    process = PythonProcess(MODULE, [f"vlv.train.{stage}", *arguments], stdout=log, stderr=log)
    state = output_dir / f"checkpoint-{KILLED_AT}" / "trainer_state.json"
    while not state.exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.kill_group()
    assert not (output_dir / "config.json").exists()


@pytest.mark.slow
def test_a_killed_run_resumes_with_the_same_losses(tmp_path, image_folder, stable_diffusion, stage1_checkpoint):
    """Of stage 1; test_survival.py kills stage 2."""
    inputs = {"model": stage1_checkpoint, "diffusion_model": stable_diffusion, "images": image_folder}
    inputs["trainable"] = "all"
    stage1.main(settings(tmp_path / "unbroken", **inputs))
    broken = settings(tmp_path / "broken", **inputs)
    run_until_killed("stage1", broken, tmp_path / "broken")
    stage1.main(broken)

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


@pytest.mark.slow
def test_training_changes_all_trainable_parameters_and_no_byte_of_frozen_parts(
    tmp_path, image_folder, stable_diffusion, stage1_checkpoint
):
    before = VLVModel.from_pretrained(stage1_checkpoint)
    trainer = stage1.main(
        [
            f"--output_dir={tmp_path}",
            f"--model={stage1_checkpoint}",
            f"--diffusion_model={stable_diffusion}",
            f"--images={image_folder}",
            "--trainable=all",
            "--max_steps=3",
            "--per_device_train_batch_size=4",
            "--learning_rate=1e-2",
            "--dataloader_num_workers=0",
            "--validation_steps=0",
            "--use_cpu",
            "--disable_tqdm=true",
        ]
    )
    model, diffusion_decoder = trainer.model, trainer.diffusion_decoder

    assert digest(diffusion_decoder) == digest(load_diffusion_decoder(str(stable_diffusion)))
    assert digest(model.text_encoder) == digest(before.text_encoder)
    frozen = [*diffusion_decoder.parameters(), *model.text_encoder.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in frozen)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if trained[name].equal(before.get_parameter(name))} == set()
    assert len(trained) == len([name for name, _ in model.named_parameters() if not name.startswith("text_encoder.")])
    diffusion_decoder.train()
    assert not diffusion_decoder.unet.training
    assert not [name for name in VLVModel.from_pretrained(tmp_path).state_dict() if "unet" in name or "vae" in name]
