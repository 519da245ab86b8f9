"""A damaged model is an error that names the damaged file; no default takes its place."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from vlv.cli.main import main

TRUNCATED, EMPTY, LIST, LACKING, DELETED = "truncated", "{}", "[]", "lacking a weight", "deleted"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def damage(path, how: str) -> None:
    if how == DELETED:
        path.unlink()
    elif how == TRUNCATED:
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
    elif how == LACKING:
        tensors = load_file(path)
        tensors.pop(sorted(tensors)[len(tensors) // 2])
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        path.write_text(how)


@pytest.fixture
def model(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "model")


@pytest.fixture
def commands(model, images, tmp_path):
    images[0].save(tmp_path / "image.png")
    image = str(tmp_path / "image.png")
    return {
        "caption": ["caption", image, "--model", str(model), "--output", str(tmp_path / "captions.json")],
        "reconstruct": [
            "reconstruct",
            image,
            "--model",
            str(model),
            "--output-dir",
            str(tmp_path / "reconstructions"),
        ],
        "info": ["info", str(model)],
        "push": ["push", str(model), "org/vlv", "--output", str(tmp_path / "pushed")],
    }


@pytest.mark.parametrize(
    ("command", "file", "how"),
    [
        ("caption", "config.json", LIST),
        ("caption", "generation_config.json", LIST),
        ("caption", "model.safetensors.index.json", EMPTY),
        ("caption", "captioner.safetensors", DELETED),
        ("caption", "encoder/model.safetensors", TRUNCATED),
        ("caption", "tokenizer.json", EMPTY),
        ("caption", "tokenizer_config.json", LIST),
        ("reconstruct", "encoder/config.json", TRUNCATED),
        ("reconstruct", "model_index.json", EMPTY),
        ("reconstruct", "scheduler/scheduler_config.json", EMPTY),
        ("reconstruct", "tokenizer/tokenizer_config.json", TRUNCATED),
        ("reconstruct", "tokenizer/tokenizer_config.json", DELETED),
        ("reconstruct", "tokenizer/tokenizer.json", EMPTY),
        ("reconstruct", "unet/config.json", DELETED),
        ("reconstruct", "vae/config.json", LIST),
        ("reconstruct", f"unet/{WEIGHTS}", LACKING),
        ("reconstruct", f"vae/{WEIGHTS}", TRUNCATED),
        ("caption", "model.safetensors.index.json", '{"weight_map": []}'),
        ("caption", "config.json", '{"model_type": "vlv", "image_encoder_config": {}, "text_config": "qwen2"}'),
        ("info", "config.json", LIST),
        ("info", f"unet/{WEIGHTS}", TRUNCATED),
        ("info", "scheduler/scheduler_config.json", TRUNCATED),
        ("push", "config.json", EMPTY),
        ("push", "model_index.json", DELETED),
        ("push", "scheduler/scheduler_config.json", EMPTY),
    ],
)
def test_the_damaged_file_is_named(command, file, how, model, commands, capsys):
    damage(model / file, how)
    assert main(commands[command]) == 2
    stderr = capsys.readouterr().err
    folder, _, name = file.rpartition("/")
    assert name in stderr or (folder and str(model / folder) in stderr), stderr


def test_push_refuses_a_language_model_without_its_configuration(model, commands, capsys):
    config = model / "config.json"
    config.write_text(config.read_text().replace('"text_config"', '"other_config"'))
    assert main(commands["push"]) == 2
    assert "text_config" in capsys.readouterr().err


def test_a_pickled_diffusion_model_is_refused(model, commands, capsys):
    for name in ("unet", "vae"):
        (model / name / WEIGHTS).rename(model / name / "diffusion_pytorch_model.bin")
    assert main(commands["reconstruct"]) == 2
    assert "pickle" in capsys.readouterr().err


def test_info_names_missing_files_and_ignores_training_checkpoints(model, commands, capsys):
    (model / "checkpoint-7").mkdir()
    shutil.copy(model / "captioner.safetensors", model / "checkpoint-7" / "model.safetensors")
    (model / "captioner.safetensors").unlink()
    (model / "training.json").write_text('{"stage1": null, "stage2": {"language_model": "Qwen/Qwen2.5-3B"}}')
    (model / "README.md").write_text("---\nlicense: [\n---\n# A model\n")
    assert main(commands["info"]) == 0
    stdout = capsys.readouterr().out
    assert "missing: captioner.safetensors" in stdout and "training checkpoints: checkpoint-7" in stdout
    assert "Qwen/Qwen2.5-3B: qwen-research" in stdout and "other: checkpoint" not in stdout


def test_push_refuses_an_incomplete_diffusion_model(model, commands, tmp_path, capsys):
    shutil.rmtree(model / "unet")
    assert main(commands["push"]) == 2
    assert "unet" in capsys.readouterr().err and not (tmp_path / "pushed").exists()


def test_a_missing_tokenizer_is_an_error_and_not_a_download(model, commands, capsys):
    shutil.rmtree(model / "tokenizer")
    assert main(commands["reconstruct"]) == 2
    assert "there is no tokenizer_config.json in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "name", "value"), [(None, "num_query_tokens", 3), ("image_encoder_config", "d_model", "x")]
)
def test_a_configuration_that_does_not_fit_the_weights_is_refused(section, name, value, model, commands, capsys):
    config = json.loads((model / "config.json").read_text())
    (config[section]["text_config"] if section else config)[name] = value
    (model / "config.json").write_text(json.dumps(config))
    assert main(commands["caption"]) == 2
    assert str(model) in capsys.readouterr().err
