"""What a run survives: kills at random moments, a full disk while it saves."""

import json
import os
import re
import resource
from pathlib import Path

import pytest

from vlv.train import last_checkpoint, stage2
from vlv.train.checkpoints import find_damage, remove_old_checkpoints

from ..interpreter import MODULE, run_python
from . import kill_repeatedly


@pytest.fixture(scope="module")
def inputs(stage1_checkpoint, language_model, image_folder) -> dict[str, str]:
    places = {"model": stage1_checkpoint, "language_model": language_model, "pairs": image_folder}
    return {name: str(place) for name, place in places.items()} | {"trainable": "projector"}


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_moments_loses_nothing(inputs, tmp_path):
    """In a process of its own: it forks."""
    command = ["tests.train.kill_repeatedly", "--times=2", f"--inputs={json.dumps(inputs)}"]
    done = run_python(MODULE, command, cwd=Path.cwd(), env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^kill ", done.stdout, re.MULTILINE)) == 2 and "equal, nothing lost" in done.stdout


@pytest.mark.slow
def test_a_full_disk_while_saving_leaves_the_last_checkpoint(inputs, tmp_path, capsys):
    """Most of the largest file of a checkpoint fits."""
    output = tmp_path / "run"
    settings = kill_repeatedly.arguments(output, 1, inputs)
    stage2.main(settings)
    checkpoint = output / "checkpoint-1"
    before = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    largest = max(map(len, before.values()))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest * 9 // 10, hard))
    try:
        with pytest.raises(SystemExit) as ended:
            stage2.main(kill_repeatedly.arguments(output, 3, inputs))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert f"vlv train stage2: {output}/checkpoint-2 could not be written: " in said and "make room" in said
    assert "Traceback" not in said
    assert not (output / ".unfinished").exists() and not (output / "checkpoint-2").exists()
    assert {path: path.read_bytes() for path in before} == before
    assert find_damage(checkpoint) is None and last_checkpoint(output) == str(checkpoint)
    stage2.main(kill_repeatedly.arguments(output, 2, inputs))
    assert list(kill_repeatedly.losses(output)) == [1, 2]


def test_the_oldest_checkpoints_are_removed_as_a_whole(tmp_path):
    (tmp_path / "waste").mkdir()
    for step in (2, 10, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "file").touch()
        os.utime(tmp_path / f"checkpoint-{step}", (step, step))
    remove_old_checkpoints(tmp_path, None, None, tmp_path / "waste")
    assert len(list(tmp_path.glob("checkpoint-*"))) == 3
    remove_old_checkpoints(tmp_path, 1, str(tmp_path / "checkpoint-2"), tmp_path / "waste")
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-10"}
    remove_old_checkpoints(tmp_path, 1, None, tmp_path / "waste")
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-10"]
    assert {path.name for path in (tmp_path / "waste").iterdir()} == {"checkpoint-2", "checkpoint-6"}
