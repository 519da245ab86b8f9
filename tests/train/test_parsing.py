"""The command line overrides the YAML file. A wrong name is an error that suggests the right one."""

import dataclasses
import re
from pathlib import Path

import pytest
from transformers import TrainingArguments

import vlv.train.configs
from vlv.train.parsing import parse_config
from vlv.train.setting_groups import INHERITED, OTHER_OWN, WITHOUT_EFFECT
from vlv.train.stage1 import Stage1Config
from vlv.train.stage2 import Stage2Config
from vlv.train.stage3 import Stage3Config

CONFIGS = Path(vlv.train.configs.__path__[0])


def parse(*arguments: str, config=Stage1Config):
    return parse_config(
        config, ["--use_cpu", *arguments] if not arguments[0].endswith(".yaml") else [*arguments, "--use_cpu"], "test"
    )


def test_the_command_line_wins_over_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("learning_rate: 1e-3\nnum_query_tokens: 16\nattend_all_queries: true\noutput_dir: there\n")
    config = parse(str(path), "--learning_rate", "1e-4", "--max_steps=7")
    assert (config.learning_rate, config.max_steps, config.num_query_tokens) == (1e-4, 7, 16)
    assert config.attend_all_queries is True and config.output_dir == "there"
    assert parse(str(path)).learning_rate == 1e-3


@pytest.mark.parametrize(
    ("stage", "config", "expected"),
    [
        (
            "stage1",
            Stage1Config,
            {"max_steps": 200_000, "learning_rate": 5e-5, "lr_scheduler_type": "cosine", "adam_beta2": 0.99},
        ),
        (
            "stage2",
            Stage2Config,
            {"max_steps": 100_000, "learning_rate": 1e-5, "lr_scheduler_type": "linear", "max_caption_tokens": 300},
        ),
    ],
)
def test_the_papers_recipe_is_in_the_defaults_and_in_the_files(stage, config, expected):
    """VLV paper, sec. 4.1."""
    from_file = parse(str(CONFIGS / f"{stage}.yaml"), "--bf16=false", config=config)
    for source in (config(use_cpu=True), from_file):
        assert {name: getattr(source, name) for name in expected} == expected
        assert source.weight_decay == 0.01 and source.max_grad_norm == 1.0
    batch = from_file.per_device_train_batch_size * 8
    assert batch == {"stage1": 512, "stage2": 64}[stage]


@pytest.mark.parametrize(
    ("text", "arguments", "words"),
    [
        ("learnign_rate: 1", [], "unknown setting 'learnign_rate'; did you mean 'learning_rate'?"),
        ("seed: 1", ["--num_querys", "3"], "unknown setting 'num_querys'; did you mean 'num_query_tokens'?"),
        ("seed: 1", ["--zzzzzz", "3"], "unknown setting 'zzzzzz'; see --help"),
        ("seed: 1", ["--photos", "3"], "unknown setting 'photos'; see --help"),
        ("seed: 1", ["--photo_dir", "3"], "unknown setting 'photo_dir'; see --help"),
        ("max_steps: many", [], "invalid int value: 'many'"),
        ("seed: 1", ["--trainable", "everything"], "trainable is 'everything'; expected one of"),
        ("seed: 1", ["--max_steps", "3", "other.yaml"], "other.yaml must come first"),
        ("- a list", [], "must contain `name: value` lines"),
        ("a: [", [], "is not valid YAML"),
        ("max_steps: 7", ["--num_train_epochs", "2"], "max_steps is 7 and num_train_epochs is 2.0; give one of them"),
        ("max_steps: -1", [], "max_steps is -1; give a number of steps, or num_train_epochs"),
        ("label_smoothing_factor: 0.1", [], "label_smoothing_factor is 0.1; it must be 0"),
    ],
)
def test_an_error_names_the_wrong_setting(tmp_path, capsys, text, arguments, words):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit):
        parse(str(path), *arguments)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "recipe"),
    [(Stage1Config, "stage1.yaml"), (Stage2Config, "stage2_under_300.yaml"), (Stage3Config, "stage3/sd21.yaml")],
)
def test_a_missing_file_is_named_beside_the_recipes_of_the_stage(capsys, config, recipe):
    with pytest.raises(SystemExit):
        parse("nowhere.yaml", config=config)
    message = capsys.readouterr().err.rpartition("error: ")[2]
    assert message.startswith("nowhere.yaml does not exist; the first argument is a YAML file, such as a recipe")
    recipes = [Path(name) for name in message.strip().partition("this package: ")[2].split(", ")]
    assert all(path.is_file() for path in recipes)
    assert (CONFIGS / recipe).resolve() in [path.resolve() for path in recipes] and len(recipes) in (2, 3)


def test_num_train_epochs_replaces_the_max_steps_of_the_recipe():
    config = parse(str(CONFIGS / "stage1.yaml"), "--num_train_epochs", "2")
    assert (config.num_train_epochs, config.max_steps) == (2, -1)


@pytest.mark.parametrize(
    ("config", "old", "new"),
    [
        (Stage1Config, "encoder", "image_encoder"),
        (Stage1Config, "decoder", "diffusion_model"),
        (Stage1Config, "num_queries", "num_query_tokens"),
        (Stage1Config, "decoder_image_size", "diffusion_image_size"),
        (Stage1Config, "decoder_gradient_checkpointing", "diffusion_gradient_checkpointing"),
        (Stage1Config, "sample_steps", "validation_steps"),
        (Stage2Config, "sample_steps", "validation_steps"),
        (Stage2Config, "sample_images", "num_validation_images"),
    ],
)
def test_a_former_name_is_an_error_with_the_present_name(tmp_path, capsys, config, old, new):
    path = tmp_path / "c.yaml"
    path.write_text(f"{old}: 4\n")
    options = [f"--{old}=4"], [f"--{old}", "4"], [f"--{old.replace('_', '-')}", "4"]
    for arguments in ([str(path)], *options):
        with pytest.raises(SystemExit):
            parse(*arguments, config=config)
        assert f"was renamed to {new!r}" in capsys.readouterr().err


def test_a_setting_of_another_stage_is_an_error_with_that_of_this_one(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    for config, name, message in (
        (Stage2Config, "images", "stage 2 trains on image-caption pairs (--pairs)"),
        (Stage1Config, "pairs", "stage 1 trains on images alone (--images)"),
    ):
        path.write_text(f"{name}: photos\n")
        for arguments in ([f"--{name}", "photos"], [str(path)]):
            with pytest.raises(SystemExit):
                parse(*arguments, config=config)
            assert f"unknown setting {name!r}: {message}" in capsys.readouterr().err


def test_a_former_name_that_a_stage_never_had_is_unknown(capsys):
    with pytest.raises(SystemExit):
        parse("--decoder=x", config=Stage2Config)
    assert "unknown setting 'decoder'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "old", "new"),
    [
        (Stage1Config, "decoder", "query_decoder"),
        (Stage2Config, "projector+lm+decoder", "projector+lm+query_decoder"),
    ],
)
def test_a_former_value_of_trainable_is_an_error_with_the_present_value(tmp_path, capsys, config, old, new):
    path = tmp_path / "c.yaml"
    path.write_text(f"trainable: {old}\n")
    for arguments in ([str(path)], ["--trainable", old]):
        with pytest.raises(SystemExit):
            parse(*arguments, config=config)
        assert f"trainable {old!r} was renamed to {new!r}" in capsys.readouterr().err


@pytest.mark.parametrize("config", [Stage1Config, Stage2Config])
def test_an_unknown_value_of_trainable_is_an_error(config):
    with pytest.raises(ValueError, match="trainable is 'everything'"):
        config(trainable="everything", use_cpu=True)


@pytest.mark.parametrize("config", [Stage1Config, Stage2Config])
def test_help_shows_vlvs_settings_first_in_groups_and_hides_those_without_effect(config, capsys):
    with pytest.raises(SystemExit):
        parse_config(config, ["--help"], "vlv train")
    text = capsys.readouterr().out
    options = re.findall(r"^  --(\w+)", text, re.MULTILINE)
    first = options.index("adam_beta1")  # of TrainingArguments alone
    own = {field.name for field in dataclasses.fields(config)} - {
        field.name for field in dataclasses.fields(TrainingArguments)
    }
    assert own <= set(options[:first]) and options[0] == "model" and OTHER_OWN not in text
    assert text.index("\nmodels:") < text.index("\ndata:") < text.index("\nthe run:") < text.index(f"\n{INHERITED}:")
    assert not WITHOUT_EFFECT & set(options)
    assert {field.name for field in dataclasses.fields(config) if field.init} - WITHOUT_EFFECT <= set(options)
