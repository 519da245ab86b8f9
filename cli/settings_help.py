"""`--help` of the commands that read settings from a YAML file: texts that are stored beside this module.

Settings are fields of dataclasses, many of them of transformers' `TrainingArguments`, whose import takes seconds. A
text is for the version of transformers that its first line names; with another version the command writes its own.
`python -m vlv.cli.settings_help` writes the texts of this checkout.
"""

import os
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "help"
WIDTH = "100"
CONFIGURATIONS = {
    "train stage1": ("vlv.train.stage1_trainer", "Stage1Config"),
    "train stage2": ("vlv.train.stage2_trainer", "Stage2Config"),
    "train stage3": ("vlv.train.stage3_config", "Stage3Config"),
    "evaluate judge": ("vlv.evaluation.protocols", "JudgeConfig"),
    "evaluate vqa": ("vlv.evaluation.protocols", "VQAConfig"),
}
"""The commands, and where their settings are defined."""


def stored_help(arguments: Sequence[str]) -> str | None:
    """The text that a command line asks for, if it is stored for the installed transformers."""
    if not {"-h", "--help"} & set(arguments):
        return None
    command = " ".join(takewhile(lambda word: not word.startswith("-"), arguments[:2]))
    if command not in CONFIGURATIONS:
        return None
    try:
        first, _, text = _file(command).read_text(encoding="utf-8").partition("\n")
    except OSError:
        return None
    return text if first == _heading() else None


def write_help(command: str) -> str:
    """The text of a command, with its first line."""
    from vlv.train.parsing import settings_parser

    module, name = CONFIGURATIONS[command]
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = WIDTH
    try:
        parser = settings_parser(getattr(import_module(module), name), f"vlv {command}")
        return f"{_heading()}\n{parser.format_help()}"
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _heading() -> str:
    return f"transformers {version('transformers')}"


def _file(command: str) -> Path:
    return FOLDER / f"{command.replace(' ', '_')}.txt"


if __name__ == "__main__":
    for command in CONFIGURATIONS:
        _file(command).write_text(write_help(command), encoding="utf-8")
