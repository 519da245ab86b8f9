"""The commands of docs/tutorial.md run as they stand there, with fewer steps."""

import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlv.cli.main import main

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
FEWER = {r"--max_steps \d+": "--max_steps 1", r"outputs/landscapes 400": "outputs/landscapes 20"}
FEWER |= {r"^vlv reconstruct": "vlv reconstruct --num-inference-steps 1", r"^vlv demo": "vlv demo --port 0"}


def parse(command: str) -> list[str]:
    """The words of a command line, with fewer steps."""
    for pattern, replacement in FEWER.items():
        command = re.sub(pattern, replacement, command)
    return shlex.split(command)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """The working folder after all commands but the last, which run in this process."""
    folder = tmp_path_factory.mktemp("tutorial")
    for name in ("checkpoints", "examples"):
        (folder / name).symlink_to(ROOT / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in COMMANDS[:-1]:
            program, *arguments = parse(command)
            if program == "vlv":
                assert main(arguments) == 0, command
            elif arguments[0] == "-c":
                exec(arguments[1], {})
            else:
                assert program == "python"
                patch.setattr(sys, "argv", arguments)
                runpy.run_path(arguments[0], run_name="__main__")
        yield folder


@pytest.mark.slow
def test_the_commands_leave_captions_and_reconstructions(folder):
    captions = json.loads((folder / "outputs" / "captions.json").read_text())
    assert sorted(captions) == [f"{number:04}.png" for number in range(6)]
    assert (folder / "outputs" / "side_by_side.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_last_command_opens_the_model_on_a_page(folder, monkeypatch):
    served = []
    monkeypatch.setattr("vlv.space.app.launch", lambda demo, **settings: served.append(demo))
    assert COMMANDS[-1] == "vlv demo --model runs/landscapes2"
    assert main(parse(COMMANDS[-1])[1:]) == 0
    picture = str(folder / "outputs" / "new" / "0000.png")
    assert list(served[0].caption(picture, 4, "greedy", 1.0, 2))
