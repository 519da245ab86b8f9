"""DeepSpeed's ZeRO with two CPU processes, launched as docs/scale.md says."""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vlv.checkpoints import MINIATURE
from vlv.hub.load import read_weight_map

from ..interpreter import MODULE, run_python
from .two_processes import CONFIGS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]


def train(stage: int, folder: Path, images: Path, zero: int | None = None, **changes: Any) -> list[float]:
    """The losses of four steps of two images, by one process, or by two with ZeRO."""
    launch: list[Any] = []
    settings: dict[str, Any] = {"model": MINIATURE, "output_dir": folder, "max_steps": 4, "save_steps": 2}
    settings |= {"logging_steps": 1, "validation_steps": 0, "dataloader_num_workers": 0, "disable_tqdm": True}
    settings |= {"images": images, "noise_by_sample": True} if stage == 1 else {"pairs": images}
    settings |= {"learning_rate": 1e-4} | changes
    if zero is None:
        settings |= {"use_cpu": True, "per_device_train_batch_size": 2}
    else:
        launch = ["accelerate.commands.launch", "--config_file", CONFIGS / f"zero{zero}_8gpu.yaml"]
        launch += ["--num_processes", 2, "-m"]
        settings |= {"ddp_backend": "gloo", "per_device_train_batch_size": 1}
    arguments = [*launch, f"vlv.train.stage{stage}", *(f"--{name}={value}" for name, value in settings.items())]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = run_python(
        MODULE,
        [str(a) for a in arguments],
        cwd=folder.parent,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "PATH": path},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    log = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in log if "loss" in row]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = set(read_weight_map(folder).values())
    return {f"{file}: {name}": tensor for file in files for name, tensor in load_file(folder / file).items()}


@pytest.mark.parametrize(("stage", "zero", "new_language_model"), [(1, 2, False), (2, 3, False), (2, 3, True)])
def test_two_processes_with_zero_have_the_losses_of_one_and_go_on_exactly(
    tmp_path, image_folder, language_model, stage, zero, new_language_model
):
    changes = {"language_model": language_model, "replace_language_model": True} if new_language_model else {}
    found = train(stage, tmp_path / "zero", image_folder, zero, **changes)
    assert found == pytest.approx(train(stage, tmp_path / "alone", image_folder, **changes), rel=1e-5)
    sharded, alone = weights(tmp_path / "zero"), weights(tmp_path / "alone")
    assert sharded.keys() == alone.keys()
    assert all(tensor.dtype == alone[name].dtype for name, tensor in sharded.items())
    assert all(torch.allclose(tensor, alone[name], atol=5e-4) for name, tensor in sharded.items())
    shutil.copytree(tmp_path / "zero" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    assert train(stage, tmp_path / "resumed", image_folder, zero, **changes) == found
    assert all(torch.equal(tensor, sharded[name]) for name, tensor in weights(tmp_path / "resumed").items())
