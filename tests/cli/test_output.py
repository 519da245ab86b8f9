"""What a run prints: its own lines, one progress bar on a terminal, and nothing of the libraries."""

import io
import os
import re
import sys

import pytest
from PIL import Image

from vlv.captioning.output import Summary
from vlv.checkpoints import MINIATURE

from ..interpreter import run_python

COMMANDS = """
import sys
from PIL import Image
from vlv.cli.main import main

images, model, out = sys.argv[1:]
Image.MAX_IMAGE_PIXELS = 3000  # Pillow warns of more, and refuses twice as many
codes = [
    main(["caption", images, "--max-new-tokens", "4", "--output", f"{out}/captions.json"]),
    main(["encode", images, "--output", f"{out}/z.safetensors"]),
    main(["reconstruct", images, "--num-inference-steps", "2", "--output-dir", f"{out}/reconstructions"]),
    main(["info", model]),
    main(["push", model, "org/name", "--output", f"{out}/repository"]),
]
sys.exit(codes != [1, 1, 1, 0, 0])
"""
OWN_LINES = re.compile(
    r"no --model given: using the embedded miniature, .*"
    r"|not images, left out: 1 \.txt"
    r"|cannot read (empty\.webp|text\.png|truncated\.jpg): .*"
    r"|(captioned|encoded|reconstructed) 6, failed 3: .*"
)


@pytest.mark.slow
def test_commands_print_no_warnings_of_libraries(mixed_folder, tmp_path):
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"  # announces five entries, holds one
    Image.new("RGB", (64, 64)).save(mixed_folder / "exif.jpg", exif=exif)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    arguments = [str(mixed_folder), str(MINIATURE), str(tmp_path)]
    done = run_python(COMMANDS, arguments, cwd=tmp_path, env=environment, with_libraries=False)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert [line for line in lines if not OWN_LINES.fullmatch(line)] == []
    assert len(lines) == 3 * 6  # of caption, encode and reconstruct: what is left out, model, failures, summary


def test_a_bar_without_an_end_gets_one_when_the_inputs_are_counted(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    summary = Summary(None)
    summary.advance(1)
    assert summary.shows_progress and "0 images [" in stream.getvalue() and "%" not in stream.getvalue()
    summary.set_total(None)
    summary.set_total(2)
    summary.advance(1)
    assert summary.close("captioned", "out.json", kept=3, skipped=1) == 0
    bars = [line for line in re.split(r"[\r\n]+", stream.getvalue()) if "%|" in line]
    assert bars[-1].startswith("100%") and " 2/2 " in bars[-1]
    assert stream.getvalue().splitlines()[-1] == "kept 3, skipped 1, captioned 0, failed 0: out.json"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()])
def test_a_terminal_shows_one_progress_bar_and_a_file_none(stream, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream)
    summary = Summary(2)
    summary.fail("a.png", "it is empty")
    for _ in range(4):
        summary.advance(0.25)
    summary.done = 1
    assert summary.close("captioned", "out.json") == 1
    lines = re.split(r"[\r\n]+", stream.getvalue())
    bars = [line for line in lines if "%|" in line]
    assert bool(bars) == stream.isatty()
    if bars:
        assert bars[0].startswith("  0%") and bars[-1].startswith("100%") and " 2/2 " in bars[-1]
    plain = [line.strip() for line in lines if line.strip() and line not in bars]
    assert plain == ["cannot read a.png: it is empty", "captioned 1, failed 1: out.json"]
