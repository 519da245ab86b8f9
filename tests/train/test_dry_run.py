"""`--dry_run` runs what the run would, prints its plan, and leaves nothing."""

import os
import re

import pytest

from vlv.train import stage1, stage2

from .test_evaluating import arguments


@pytest.mark.slow
def test_a_dry_run_prints_the_plan_and_leaves_the_output_folder_as_it_is(
    tmp_path, image_folder, stage1_checkpoint, stable_diffusion, capsys
):
    run = tmp_path / "run"
    run.mkdir()
    (run / "note.txt").write_text("mine")
    inputs = {"model": stage1_checkpoint, "diffusion_model": stable_diffusion, "images": image_folder}
    more = {"max_steps": 1000, "save_strategy": "steps", "save_steps": 100, "save_total_limit": 3}
    trainer = stage1.main([*arguments(run, **inputs, **more, overwrite_output_dir=True), "--dry_run"])
    assert trainer.state.global_step == 2 and trainer.args.max_steps == 1000
    assert os.listdir(tmp_path) == ["run"] and os.listdir(run) == ["note.txt"]
    plan = capsys.readouterr().out
    assert "images: 16 in an epoch" in plan and "steps: 1,000 of 4 images, 250 epochs" in plan
    trainable = {name: p.numel() for name, p in trainer.model.named_parameters() if p.requires_grad}
    projector = sum(count for name, count in trainable.items() if name.startswith("projector."))
    assert f"  projector: {projector:,} trainable, 0 frozen" in plan
    text_encoder = sum(p.numel() for p in trainer.model.text_encoder.parameters())
    assert f"  text_encoder: 0 trainable, {text_encoder:,} frozen" in plan
    unet = sum(p.numel() for p in trainer.diffusion_decoder.unet.parameters())
    assert f"  diffusion model: unet: 0 trainable, {unet:,} frozen" in plan
    assert re.search(r"the process used at most [\d.]+ GB; vlv estimate counts [\d.e-]+ GB on each GPU", plan), plan
    assert re.search(r"expected time: .* \(1,000 steps of [\d.]+ s", plan) and "3 checkpoints of" in plan


@pytest.mark.slow
def test_a_dry_run_names_what_would_fail(tmp_path, image_folder, stage1_checkpoint, capsys):
    inputs = {"model": stage1_checkpoint, "language_model": tmp_path / "nothing", "pairs": image_folder}
    with pytest.raises(SystemExit) as stopped:
        stage2.main([*arguments(tmp_path / "run", **inputs), "--dry_run"])
    assert stopped.value.code == 2 and "nothing" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
