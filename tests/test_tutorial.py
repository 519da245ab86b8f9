"""The commands of docs/tutorial.md run as they stand there, with fewer steps."""

import json
import os
import re
import runpy
import shlex
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlv.cli.main import main

from .interpreter import MODULE, PythonProcess

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
FEWER = {r"--max_steps \d+": "--max_steps 1", r"outputs/landscapes 400": "outputs/landscapes 20"}
FEWER |= {r"^vlv reconstruct": "vlv reconstruct --num-inference-steps 1", r"^vlv demo": "vlv demo --port 0"}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "GRADIO_ANALYTICS_ENABLED": "False", "CUDA_VISIBLE_DEVICES": ""}


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
def test_the_last_command_serves_a_page(folder):
    assert COMMANDS[-1] == "vlv demo --model runs/landscapes2"
    arguments = ["vlv.cli.main", *parse(COMMANDS[-1])[1:]]
    log = folder / "log"
    log.touch()
    server = PythonProcess(MODULE, arguments, stdout=log, stderr=log, cwd=folder, env=ENVIRONMENT)
    try:
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
        with urllib.request.urlopen(found.group(), timeout=60) as page:
            assert page.status == 200
    finally:
        server.kill_group()
