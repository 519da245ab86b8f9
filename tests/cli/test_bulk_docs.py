"""The commands in docs/bulk.md run on a few images."""

import os
import re
import shlex
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from vlv.cli.main import build_parser, main

from ..interpreter import MODULE, run_python

DOCS = Path(__file__).parents[2] / "docs" / "bulk.md"
LAST_OF_AN_ARRAY = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2"}
LAST_OF_AN_ARRAY |= {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "1"}
SHARDS = "2"  # in place of the number in a command: three images do not fill more
ACCELERATE, RAY, VLLM, JOB = "accelerate launch", "--engine ray", "--engine vllm", "caption-dataset.py"
BLOCKS = re.findall(r"^```bash\n(.*?)^```", DOCS.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def with_any(*words: str) -> list[str]:
    """The blocks that have one of these words."""
    return [block for block in BLOCKS if any(word in block for word in words)]


def commands(block: str) -> list[list[str]]:
    """The arguments of each `vlv` in a block."""
    return [shlex.split(line)[1:] for line in block.splitlines() if line.startswith("vlv ")]


@pytest.fixture
def here(images, tmp_path, monkeypatch) -> Path:
    """The working folder, with `photos/` and tar files of them."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for number, image in enumerate(images[:3]):
        image.save(f"photos/{number}.png")
    for number in range(2):
        with tarfile.open(f"photos-{number}.tar", "w") as tar:
            tar.add(f"photos/{number}.png", arcname=f"{number}.png")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for block in BLOCKS if block not in with_any(ACCELERATE, VLLM, JOB)])
def test_the_commands_run(block, here, model_folder, monkeypatch):
    if RAY in block and find_spec("ray") is None:
        pytest.skip("the extra [ray] is not installed")
    if "#SBATCH" in block:
        for name, value in LAST_OF_AN_ARRAY.items():
            monkeypatch.setenv(name, value)
    assert commands(block)
    for arguments in commands(block):
        files = [sorted(map(str, Path().glob(word))) if "*" in word else [word] for word in arguments]
        if "--shards" in arguments:
            files[arguments.index("--shards") + 1] = [SHARDS]
        settings = [] if "--merge" in arguments else ["--model", str(model_folder), "--max-new-tokens", "4"]
        assert main([word for words in files for word in words] + settings) == 0


@pytest.mark.slow
def test_accelerate_gives_each_process_its_shards(here, model_folder):
    """On CPUs `accelerate launch` starts several processes with `--multi_gpu` alone, which it adds itself for GPUs."""
    (block,) = with_any(ACCELERATE)
    words = re.sub(r"(--num_processes|--shards) \d+", rf"\1 {SHARDS}", block)
    launcher = ["--multi_gpu", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    launcher += ["--main_process_port=0", "--tee=3"]  # a free port; lines with the process that has written them
    settings = ["--model", str(model_folder), "--max-new-tokens", "4", "--device", "cpu"]
    command = ["accelerate.commands.launch", *launcher, *shlex.split(words)[2:], *settings]
    done = run_python(MODULE, command, cwd=here, env=os.environ)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    written = re.findall(r"\[default(\d)\]:captioned \d, failed 0: captions/shard-0000(\d)-of-00002", said)
    assert sorted(written) == [("0", "0"), ("1", "1")]
    assert main(["caption", "--merge", "captions", "--output", "captions.json"]) == 0


def test_the_command_for_vllm_has_options_that_exist():
    (block,) = with_any(VLLM)
    for arguments in commands(block):
        assert build_parser().parse_args(arguments).engine == "vllm"


def test_every_command_is_run_or_named():
    """A command that is not run everywhere by the tests above stands in a section that says where it was run."""
    text = DOCS.read_text(encoding="utf-8")
    assert not re.search(r"\b[A-Z]+(_[A-Z]+)*_HERE\b|\bTODO\b|\bTBD\b", text)
    sections = re.split(r"^## ", text, flags=re.MULTILINE)
    others = with_any(RAY, VLLM, JOB)
    assert len(others) == 3
    for block in others:
        (section,) = [section for section in sections if block in section]
        assert re.search(r"^(Not run|Run here)", section, re.MULTILINE), block
