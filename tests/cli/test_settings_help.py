"""The stored --help of commands that read settings is what their parsers write."""

import re
from pathlib import Path

import pytest

from vlv.cli import settings_help
from vlv.cli.main import main

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


def test_stored_texts_are_of_the_transformers_of_the_constraints():
    (pinned,) = re.findall(r"^transformers==(.+)$", CONSTRAINTS.read_text(), re.MULTILINE)
    headings = {path.read_text().partition("\n")[0] for path in settings_help.FOLDER.glob("*.txt")}
    assert headings == {f"transformers {pinned}"}, "run `python -m vlv.cli.settings_help`"


@pytest.mark.parametrize("command", settings_help.CONFIGURATIONS)
def test_stored_texts_are_those_of_the_parsers(command):
    expected = settings_help.write_help(command)
    if not (settings_help.FOLDER / f"{command.replace(' ', '_')}.txt").read_text().startswith(expected.split("\n")[0]):
        pytest.skip("the stored texts are of another transformers")
    stored = settings_help.stored_help([*command.split(), "--help"])
    assert stored == expected.split("\n", 1)[1], "run `python -m vlv.cli.settings_help`"


def test_a_text_of_another_transformers_is_written_anew(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(settings_help, "FOLDER", tmp_path)
    (tmp_path / "train_stage1.txt").write_text("transformers 0.0\nan old text\n")
    assert settings_help.stored_help(["train", "stage1", "--help"]) is None
    with pytest.raises(SystemExit, match="0"):
        main(["train", "stage1", "--help"])
    assert "--diffusion_model" in capsys.readouterr().out


def test_other_commands_and_values_ask_for_no_stored_text():
    assert settings_help.stored_help(["train", "stage1", "config.yaml"]) is None
    assert settings_help.stored_help(["caption", "--help"]) is None
