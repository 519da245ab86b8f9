"""Two processes train as one does with the same global batch, with DDP and with FSDP2, and leave the same files."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file

from vlv import VLVForConditionalGeneration, VLVModel
from vlv.hub.layout import ADAPTER_FOLDER, ENCODER_FILE, ENCODER_PREFIX, WEIGHTS_FILE
from vlv.hub.load import read_weight_map
from vlv.train import last_checkpoint
from vlv.train.failing import EXIT_CODE
from vlv.train.lora import ADAPTER_FILE

from ..builders import assert_close_to_scale
from ..interpreter import run_python
from .two_processes import CONFIGS, LORA, STEPS, launch_environment, stage3, train, trainer_of

ROOT = Path(__file__).parents[2]
ENGINES = ("ddp", "fsdp2")
STAGES = ("stage1", "stage2")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configurations(path):
    config = load_config_from_file(str(path))
    engine, _, size = path.stem.partition("_")
    assert config.distributed_type == {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(engine, "DEEPSPEED")
    assert (config.num_machines, config.num_processes) == {"8gpu": (1, 8), "2nodes": (2, 16)}[size]
    assert config.mixed_precision == "no"  # the stage's setting decides
    if engine == "fsdp2":
        assert launch_environment(path.name)["FSDP_VERSION"] == "2"
    if engine.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(engine[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The trainings of both engines."""
    folder = tmp_path_factory.mktemp("scale")
    code = "import sys; from pathlib import Path; from tests.train.two_processes import main; main(Path(sys.argv[1]))"
    done = run_python(code, [str(folder)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == EXIT_CODE, done.stderr[-3000:]  # of the failure at the end
    (folder / "stderr").write_text(done.stderr)
    return folder


@pytest.fixture(scope="module")
def results(folder) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, Any]:
    """The trainings of one process, in a folder `folder`."""
    folder = tmp_path_factory.mktemp("alone")
    runs = {stage: train(int(stage[-1]), folder / stage, **settings(stage)) for stage in STAGES}
    return {
        **runs,
        "lora": train(2, folder / "lora", **LORA),
        "stage3": stage3(folder / "stage3"),
        "folder": folder,
    }


def settings(stage: str) -> dict[str, Any]:
    return {"noise_by_sample": True, "ema_decay": 0.9} if stage == "stage1" else {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "run"), [(engine, stage) for engine in ENGINES for stage in STAGES] + [("fsdp2", "lora")]
)
def test_two_processes_have_the_losses_of_one(results, alone, engine, run):
    assert results[engine][run]["losses"] == pytest.approx(alone[run]["losses"], rel=1e-5)
    assert len(set(alone[run]["losses"])) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "run"), [("ddp", "stage1"), ("fsdp2", "stage1"), ("ddp", "stage2"), ("fsdp2", "lora")]
)
def test_a_resumed_run_ends_as_the_unbroken_one(results, folder, engine, run):
    found = results[engine]
    assert found[f"{run}-resumed"]["losses"] == found[run]["losses"]
    if run == "stage1":
        resumed, unbroken = (load_file(folder / engine / place / ENCODER_FILE) for place in (f"{run}-resumed", run))
        assert all(torch.equal(resumed[name], tensor) for name, tensor in unbroken.items())


@pytest.mark.slow
def test_two_processes_share_the_captions_of_a_round_and_train_on_those_of_one(results, alone):
    """Later rounds may differ: samples follow the weights, which differ in the last digits."""
    found = results["ddp"]["stage3"]
    assert found["parts"] == [2, 2, 2, 2] and alone["stage3"]["parts"] == [4, 4]
    assert found["rounds"][0] == json.loads(json.dumps(alone["stage3"]["rounds"][0]))
    assert any(reward is not None for _, _, rewards in found["rounds"][0] for reward in rewards)
    assert found["losses"][0] == pytest.approx(alone["stage3"]["losses"][0], rel=1e-5)
    resumed = results["ddp"]["stage3-resumed"]
    assert resumed["parts"] == [2, 2, 3, 1]  # of the two that were missing each process has one
    assert resumed["rounds"] == found["rounds"] and resumed["losses"] == found["losses"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_checkpoint_of_trained_tensors_alone_has_them_as_a_complete_one(results, folder, engine):
    last = f"checkpoint-{STEPS}"
    trained = load_file(folder / engine / "stage1-resumed" / last / WEIGHTS_FILE)
    complete = load_file(folder / engine / "stage1" / last / ENCODER_FILE)
    assert set(trained) == set(results[engine]["stage1-resumed"]["trained"]) and len(trained) < len(complete)
    assert all(torch.equal(complete[ENCODER_PREFIX + name], tensor) for name, tensor in trained.items())


@pytest.mark.slow
def test_sharded_lora_layers_are_saved_as_one_adapter_and_merged(folder, alone):
    sharded, single = folder / "fsdp2" / "lora", alone["folder"] / "lora"
    adapters = [load_file(run / ADAPTER_FOLDER / ADAPTER_FILE) for run in (sharded, single)]
    assert adapters[0].keys() == adapters[1].keys() and len(adapters[0]) > 4
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[5, 6, 3]]).expand(2, 3)
    merged, other = (VLVForConditionalGeneration.from_pretrained(run).eval() for run in (sharded, single))
    logits = merged(pixels, labels=labels).logits
    assert_close_to_scale(logits, other(pixels, labels=labels).logits)
    adapted = VLVForConditionalGeneration(merged.config).eval()
    adapted.load_state_dict(merged.state_dict())
    torch.manual_seed(0)  # as the training began
    adapted.language_model.load_state_dict(trainer_of(2, folder / "start").model.language_model.state_dict())
    adapted.language_model = PeftModel.from_pretrained(adapted.language_model, sharded / ADAPTER_FOLDER)
    assert_close_to_scale(logits, adapted(pixels, labels=labels).logits)
    with adapted.language_model.disable_adapter():
        assert (adapted(pixels, labels=labels).logits - logits).abs().max() > 1e-4  # the layers were trained
    assert not (sharded / "checkpoint-2" / "config.json").exists()  # the adapter alone


@pytest.mark.slow
def test_a_failure_of_one_process_ends_the_others_with_a_line_that_names_it(folder):
    said = [line for line in (folder / "stderr").read_text().splitlines() if line.startswith("vlv train stage2: ")]
    reason = "6 bytes is not an image in a format that can be read"
    assert sorted(said) == [
        f"vlv train stage2: {reason}",
        f"vlv train stage2: process 1 (of 2, from 0 on) has failed: {reason}; this process ends, too",
    ]
    assert "Traceback" not in (folder / "stderr").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "model_class"), [("stage1", VLVModel), ("stage2", VLVForConditionalGeneration)])
def test_shards_are_saved_as_one_model(folder, alone, stage, model_class):
    sharded, single = folder / "fsdp2" / stage, alone["folder"] / stage
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    labels = {"labels": torch.tensor([[5, 6, 3]]).expand(2, 3)} if stage == "stage2" else {}
    for place in ("", "checkpoint-2"):
        weights = [read_weight_map(run / place) for run in (sharded, single)]
        assert weights[0] == weights[1]
        models = [model_class.from_pretrained(run / place).eval() for run in (sharded, single)]
        outputs = [model(pixels, **labels) for model in models]
        # Weights differ where gradients are almost 0, which Adam scales up to the size of all others.
        assert_close_to_scale(outputs[0].caption_embeds, outputs[1].caption_embeds)
        if stage == "stage2":
            assert_close_to_scale(outputs[0].logits, outputs[1].logits)
        assert models[0].config.architectures == [model_class.__name__]
    names = {path.name for path in single.iterdir()}
    assert {path.name for path in sharded.iterdir()} == names | {"samples"}
    assert last_checkpoint(sharded) == str(sharded / f"checkpoint-{STEPS}")
    assert not list(sharded.glob("checkpoint-*/pytorch_model_fsdp*"))  # a second copy of the weights


@pytest.mark.slow
def test_sharded_models_write_the_validation_samples_of_replicated_ones(folder):
    captions = [
        json.loads((folder / engine / "stage2" / "samples" / f"step-{STEPS:07d}.json").read_text())
        for engine in ENGINES
    ]
    assert captions[0] == captions[1] and captions[0][0]["generated"]
    grids = [Image.open(folder / engine / "stage1" / "samples" / f"step-{STEPS:07d}.png") for engine in ENGINES]
    first, second = (torch.from_numpy(np.array(grid.convert("L"))).float() for grid in grids)
    assert (first - second).abs().max() <= 1 and first.std() > 5


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_part_that_is_unfrozen_in_mixed_precision_gets_gradients_and_moves(results, engine):
    found = results[engine]["unfreezing"]
    assert found["moved"][:3] == [0, 0, 0] and found["moved"][3] > 1e-5
    assert found["gradients"][:2] == [-1, -1] and found["gradients"][2] > 0
    assert found["earlier"] > 1e-4  # the rest of the model was trained from the start
    assert found["dtypes"] == ["torch.float32"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_the_optimiser_has_the_trainable_parameters_alone(results, folder, engine):
    for stage in STAGES:
        assert results[engine][stage]["in_optimiser"] == results[engine][stage]["trainable"]
        assert results[engine][stage]["frozen_in_optimiser"] == 0
    assert results[engine]["stage1"]["sharded_denoiser"] == (engine == "fsdp2")
    if engine == "ddp":
        state = torch.load(folder / "ddp" / "stage1" / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"]
        assert len(state) == results["ddp"]["stage1"]["trainable"]
