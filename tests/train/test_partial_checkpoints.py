"""`save_only_trainable`: checkpoints hold what is trained, a run goes on from them exactly, its end is complete."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from vlv import VLVForConditionalGeneration, VLVModel, hub
from vlv.cli.main import main
from vlv.train import Stage2Config, freeze_for_stage1, stage1, stage2
from vlv.train.checkpoints import check_settings
from vlv.train.sharding import load_weights

STEPS, SAVED = 4, 2


def arguments(**settings) -> list[str]:
    common = {
        "max_steps": STEPS,
        "save_steps": SAVED,
        "logging_steps": 1,
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-3,
        "validation_steps": 0,
        "dataloader_num_workers": 0,
        "save_only_trainable": True,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return [f"--{name}={value}" for name, value in (common | settings).items()]


def losses(trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, stage1_checkpoint, stable_diffusion, image_folder):
    model = shutil.copytree(stage1_checkpoint, tmp_path_factory.mktemp("start") / "model")
    return {"model": model, "diffusion_model": stable_diffusion, "images": image_folder, "trainable": "query_decoder"}


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """The trainer of a run, and its folder."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return stage1.main(arguments(output_dir=folder, **inputs)), folder


@pytest.fixture
def broken_off(run, tmp_path):
    """The folder of the run as it was after its first checkpoint."""
    folder = tmp_path / "broken_off"
    shutil.copytree(run[1] / f"checkpoint-{SAVED}", folder / f"checkpoint-{SAVED}")
    return folder


@pytest.mark.slow
def test_a_checkpoint_holds_the_trained_tensors_and_the_end_is_a_complete_model(run, inputs):
    trainer, folder = run
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    weights = load_file(folder / f"checkpoint-{STEPS}" / "model.safetensors")
    assert set(weights) == trained and 0 < len(trained) < len(list(trainer.model.parameters()))
    assert not (folder / f"checkpoint-{STEPS}" / "config.json").exists()
    model, before = hub.load_encoder(folder)[0].state_dict(), VLVModel.from_pretrained(inputs["model"]).state_dict()
    assert all(model[name].equal(weights.get(name, before[name])) for name in before)
    assert not weights["query_tokens"].equal(before["query_tokens"])


@pytest.mark.slow
def test_a_resumed_run_has_the_losses_and_weights_of_the_unbroken_one(run, broken_off, inputs):
    resumed = stage1.main(arguments(output_dir=broken_off, **inputs))
    assert losses(resumed) == losses(run[0]) and len(losses(resumed)) == STEPS
    expected = run[0].model.state_dict()
    assert all(tensor.equal(expected[name]) for name, tensor in resumed.model.state_dict().items())


@pytest.mark.slow
def test_a_run_that_is_ended_at_its_checkpoint_leaves_the_complete_model(broken_off, inputs):
    weights = load_file(broken_off / f"checkpoint-{SAVED}" / "model.safetensors")
    stage1.main(arguments(output_dir=broken_off, max_steps=SAVED, **inputs))
    model = hub.load_encoder(broken_off)[0].state_dict()
    assert all(model[name].equal(tensor) for name, tensor in weights.items())


def test_another_start_model_is_refused_even_where_changes_are_accepted(run, broken_off, inputs, tmp_path):
    other = shutil.copytree(inputs["model"], tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["projector.linear_1.bias"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    changed = inputs | {"model": other, "accept_changes": True}
    with pytest.raises(
        SystemExit, match=r"(?s)needs the models that the run started from.*  model: .*model.* -> .*other"
    ):
        stage1.main(arguments(output_dir=broken_off, **changed))


@pytest.mark.parametrize(
    ("setting", "other"), [("gguf_file", "other.gguf"), ("load_in_4bit", True), ("replace_language_model", True)]
)
def test_other_weights_of_the_start_models_are_refused_even_where_changes_are_accepted(tmp_path, setting, other):
    settings = {"pairs": "a", "gguf_file": "one.gguf", "load_in_4bit": False, "replace_language_model": False}
    (tmp_path / "run.json").write_text(json.dumps({"steps": 1, "settings": settings}))
    assert set(settings) - {"pairs"} <= set(Stage2Config(use_cpu=True).result_settings())
    with pytest.raises(ValueError, match=rf"needs the models that the run started from(?s:.*)  {setting}: "):
        check_settings(tmp_path, settings | {setting: other}, accept_changes=True, other_settings={})
    (tmp_path / "config.json").write_text("{}")  # a complete model
    check_settings(tmp_path, settings | {setting: other}, accept_changes=True, other_settings={})


def test_a_checkpoint_without_a_trained_tensor_is_refused(run, broken_off, inputs):
    path = broken_off / f"checkpoint-{SAVED}" / "model.safetensors"
    weights = load_file(path)
    del weights["query_tokens"]
    save_file(weights, path, metadata={"format": "pt", "tensors": "trained"})
    record = path.with_name("run.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"files": {}}))
    with pytest.raises(SystemExit, match=r"are not those of this model: \['query_tokens'\]"):
        stage1.main(arguments(output_dir=broken_off, **inputs))


@pytest.fixture
def one_process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_shards_are_not_read_from_a_checkpoint_without_a_trained_tensor(one_process_group, encoder, tmp_path):
    freeze_for_stage1(encoder, "projector")
    trained = {name: p.detach() + 1 for name, p in encoder.named_parameters() if p.requires_grad}
    sharded = fully_shard(encoder, mesh=init_device_mesh("cpu", (1,)))
    contents = {"format": "pt", "tensors": "trained"}
    save_file(trained, tmp_path / "model.safetensors", metadata=contents)
    load_weights(sharded, tmp_path)
    assert all(sharded.get_parameter(name).full_tensor().equal(tensor) for name, tensor in trained.items())
    del trained["query_tokens"]
    save_file(trained, tmp_path / "model.safetensors", metadata=contents)
    with pytest.raises(ValueError, match=r"are not those of this model: \['query_tokens'\]"):
        load_weights(sharded, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["caption", "encode", "reconstruct", "info", "push", "stage1", "stage2"])
def test_a_command_that_is_given_a_checkpoint_says_what_it_is(command, run, inputs, images, tmp_path, capsys):
    checkpoint = run[1] / f"checkpoint-{SAVED}"
    words = f"{checkpoint} is a checkpoint of a run with save_only_trainable, without what is frozen; the end of"
    images[0].save(tmp_path / "image.png")
    if command in ("stage1", "stage2"):
        data = {"images": inputs["images"]} if command == "stage1" else {"pairs": inputs["images"]}
        with pytest.raises(SystemExit, match="save_only_trainable, without what is frozen"):
            {"stage1": stage1, "stage2": stage2}[command].main(
                arguments(output_dir=tmp_path / "run", model=checkpoint, **data)
            )
        return
    options = {
        "info": [checkpoint],
        "push": [checkpoint, "org/name", "--output", tmp_path / "repository"],
        "caption": [tmp_path / "image.png", "--model", checkpoint, "--output", tmp_path / "captions.json"],
    }.get(command, [tmp_path / "image.png", "--model", checkpoint])
    assert main([command, *map(str, options)]) != 0
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_lora_layers_and_what_else_is_trained_are_saved_and_read(inputs, stage1_checkpoint, language_model, tmp_path):
    settings = {"model": stage1_checkpoint, "language_model": language_model, "pairs": inputs["images"]}
    settings |= {"lora_rank": 2, "trainable": "projector", "max_steps": 2, "save_steps": 1}
    whole = stage2.main(arguments(output_dir=tmp_path / "whole", **settings))
    checkpoint = tmp_path / "whole" / "checkpoint-1"
    names = set(load_file(checkpoint / "model.safetensors"))
    assert {name.split(".")[0] for name in names} == {"language_projection"}
    assert (checkpoint / "adapter" / "adapter_model.safetensors").is_file()
    shutil.copytree(checkpoint, tmp_path / "resumed" / "checkpoint-1")
    resumed = stage2.main(arguments(output_dir=tmp_path / "resumed", **settings))
    assert losses(resumed) == losses(whole)
    models = [
        VLVForConditionalGeneration.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "resumed")
    ]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
