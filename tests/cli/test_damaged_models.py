"""A damaged model is an error of one line that names the file; nothing is guessed in its place."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from vlv.cli.main import main

TRUNCATED, EMPTY, LIST, LACKING, GONE = "truncated", "{}", "[]", "lacking a weight", "gone"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def damage(path, how: str) -> None:
    if how == GONE:
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
def commands(model, pictures, tmp_path):
    pictures[0].save(tmp_path / "picture.png")
    picture = str(tmp_path / "picture.png")
    return {
        "caption": ["caption", picture, "--model", str(model), "--output", str(tmp_path / "captions.json")],
        "reconstruct": ["reconstruct", picture, "--model", str(model), "--output-dir", str(tmp_path / "drawn")],
        "info": ["info", str(model)],
        "push": ["push", str(model), "org/vlv", "--output", str(tmp_path / "pushed")],
    }


@pytest.mark.parametrize(
    ("command", "file", "how"),
    [
        ("caption", "config.json", LIST),
        ("caption", "generation_config.json", LIST),
        ("caption", "model.safetensors.index.json", EMPTY),
        ("caption", "language_model.safetensors", GONE),
        ("caption", "encoder/model.safetensors", TRUNCATED),
        ("caption", "tokenizer.json", EMPTY),
        ("caption", "tokenizer_config.json", LIST),
        ("reconstruct", "encoder/config.json", TRUNCATED),
        ("reconstruct", "model_index.json", EMPTY),
        ("reconstruct", "scheduler/scheduler_config.json", EMPTY),
        ("reconstruct", "tokenizer/tokenizer_config.json", TRUNCATED),
        ("reconstruct", "tokenizer/tokenizer_config.json", GONE),
        ("reconstruct", "tokenizer/tokenizer.json", EMPTY),
        ("reconstruct", "unet/config.json", GONE),
        ("reconstruct", "vae/config.json", LIST),
        ("reconstruct", f"unet/{WEIGHTS}", LACKING),
        ("reconstruct", f"vae/{WEIGHTS}", TRUNCATED),
        ("caption", "model.safetensors.index.json", '{"weight_map": []}'),
        ("caption", "config.json", '{"model_type": "vlv", "image_encoder_config": {}, "text_config": "qwen2"}'),
        ("info", "config.json", LIST),
        ("info", f"unet/{WEIGHTS}", TRUNCATED),
        ("info", "scheduler/scheduler_config.json", TRUNCATED),
        ("push", "config.json", EMPTY),
        ("push", "model_index.json", GONE),
        ("push", "scheduler/scheduler_config.json", EMPTY),
    ],
)
def test_the_file_is_named(command, file, how, model, commands, capsys):
    damage(model / file, how)
    assert main(commands[command]) == 2
    said = capsys.readouterr().err
    folder, _, name = file.rpartition("/")
    assert name in said or (folder and str(model / folder) in said), said


def test_a_configuration_that_forgot_its_language_model_does_not_lose_it(model, commands, capsys):
    config = model / "config.json"
    config.write_text(config.read_text().replace('"text_config"', '"was_decoder_config"'))
    assert main(commands["push"]) == 2
    assert "text_config" in capsys.readouterr().err


def test_a_decoder_of_pickles_says_how_to_convert_it(model, commands, capsys):
    for name in ("unet", "vae"):
        (model / name / WEIGHTS).rename(model / name / "diffusion_pytorch_model.bin")
    # (load_encoder refuses the pickles of a VLV's own folder; a Stable Diffusion folder may hold them)
    assert main(commands["reconstruct"]) == 2
    assert "pickle" in capsys.readouterr().err


def test_info_names_what_is_missing_and_leaves_a_trainers_checkpoints_out(model, commands, capsys):
    (model / "checkpoint-7").mkdir()
    shutil.copy(model / "language_model.safetensors", model / "checkpoint-7" / "model.safetensors")
    (model / "language_model.safetensors").unlink()
    (model / "training.json").write_text('{"stage1": null, "stage2": {"language_model": "Qwen/Qwen2.5-3B"}}')
    (model / "README.md").write_text("---\nlicense: [\n---\n# A model\n")
    assert main(commands["info"]) == 0
    said = capsys.readouterr().out
    assert "missing: language_model.safetensors" in said and "training checkpoints: checkpoint-7" in said
    assert "Qwen/Qwen2.5-3B: qwen-research" in said and "other: checkpoint" not in said


def test_half_a_decoder_is_not_left_out(model, commands, tmp_path, capsys):
    shutil.rmtree(model / "unet")
    assert main(commands["push"]) == 2
    assert "unet" in capsys.readouterr().err and not (tmp_path / "pushed").exists()


def test_a_missing_tokenizer_is_not_looked_for_on_the_hub(model, commands, capsys):
    shutil.rmtree(model / "tokenizer")
    assert main(commands["reconstruct"]) == 2
    assert "there is no tokenizer_config.json in" in capsys.readouterr().err


@pytest.mark.parametrize("change", [("num_query_tokens", 3), ("d_model", "x")])
def test_a_configuration_of_another_model(change, model, commands, capsys):
    config = json.loads((model / "config.json").read_text())
    (config if change[0] == "num_query_tokens" else config["image_encoder_config"]["text_config"])[change[0]] = change[
        1
    ]
    (model / "config.json").write_text(json.dumps(config))
    assert main(commands["caption"]) == 2
    assert str(model) in capsys.readouterr().err
