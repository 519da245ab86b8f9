"""The commands of docs/data_preparation.md run, one after the other, on small data."""

import re
import shlex
from glob import glob
from pathlib import Path

import pytest

from vlv.cli.main import build_parser, main
from vlv.train import load_images, load_pairs

from ..evaluation.openai_server import Reply, scripted_endpoint
from .inputs import write_metadata, write_pictures

PAGE = (Path(__file__).parents[2] / "docs" / "data_preparation.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(bash|)\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]


@pytest.mark.slow
def test_the_commands_of_the_page_run(tmp_path, monkeypatch):
    (tmp_path / "metadata").mkdir()
    write_metadata(tmp_path / "metadata" / "1.parquet", 900)
    write_pictures(tmp_path / "photos", 12)
    monkeypatch.chdir(tmp_path)
    with scripted_endpoint(lambda words, times: Reply("a picture with many colours")) as script:
        for line in COMMANDS:
            words = shlex.split(line.replace("http://127.0.0.1:8000/v1", script.url), comments=True)
            words = [name for word in words for name in (sorted(glob(word)) if "*" in word else [word])]
            assert words[:2] == ["vlv", "data"] and main(words[1:]) == 0, line
    assert len(load_pairs("teacher.jsonl")) == len(load_pairs("shards")) == len(load_images("dedup/kept.jsonl")) == 12
    assert [item["caption"] for item in load_pairs("pairs")] == ["a picture with many colours"] * 12
    assert len(load_pairs("tables")) == len(load_pairs("lists/train.jsonl")) < 12


def test_the_page_has_every_step():
    steps = build_parser()._subparsers._group_actions[0].choices["data"]._subparsers._group_actions[0].choices
    assert {re.match(r"vlv data (\w+)", line)[1] for _, block in BLOCKS for line in block.splitlines()} == set(steps)


@pytest.mark.parametrize("block", [block for kind, block in BLOCKS if kind != "bash"])
def test_the_commands_that_need_other_programs_have_options_that_exist(block):
    for line in block.splitlines():
        build_parser().parse_args(shlex.split(line)[1:])
