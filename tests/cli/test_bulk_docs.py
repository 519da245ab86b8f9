"""The commands in docs/bulk.md run on a few images."""

import re
import shlex
import tarfile
from pathlib import Path

import pytest

from vlv.cli.main import main

DOCS = Path(__file__).parents[2] / "docs" / "bulk.md"
ENVIRONMENTS = {  # of the last of the processes that a launcher starts
    "accelerate": {"RANK": "1", "WORLD_SIZE": "2"},
    "#SBATCH": {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2"}
    | {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "1"},
}
SHARDS = "2"  # in place of the number in a command: three images do not fill more
NOT_RUN_HERE = ("--engine", "caption-dataset.py")  # docs/bulk.md says where these were run
BLOCKS = re.findall(r"^```bash\n(.*?)^```", DOCS.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(block: str) -> list[list[str]]:
    """The arguments of each `vlv` in a block."""
    lines = [re.sub(r"^accelerate launch .* -m vlv\.cli ", "vlv ", line) for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("vlv ")]


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for block in BLOCKS if not any(word in block for word in NOT_RUN_HERE)])
def test_the_commands_run(block, images, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for number, image in enumerate(images[:3]):
        image.save(f"photos/{number}.png")
    for number in range(2):
        with tarfile.open(f"photos-{number}.tar", "w") as tar:
            tar.add(f"photos/{number}.png", arcname=f"{number}.png")
    for word, variables in ENVIRONMENTS.items():
        for name, value in variables.items():
            if word in block:
                monkeypatch.setenv(name, value)
    assert commands(block)
    for arguments in commands(block):
        files = [sorted(map(str, Path().glob(word))) if "*" in word else [word] for word in arguments]
        if "--shards" in arguments:
            files[arguments.index("--shards") + 1] = [SHARDS]
        settings = [] if "--merge" in arguments else ["--model", str(model_folder), "--max-new-tokens", "4"]
        assert main([word for words in files for word in words] + settings) == 0


def test_every_command_is_run_or_named():
    """A command that is not run by the test above stands in a section that says where it was run."""
    text = DOCS.read_text(encoding="utf-8")
    assert not re.search(r"\b[A-Z]+(_[A-Z]+)*_HERE\b|\bTODO\b|\bTBD\b", text)
    sections = re.split(r"^## ", text, flags=re.MULTILINE)
    others = [block for block in BLOCKS if any(word in block for word in NOT_RUN_HERE)]
    assert len(others) == 3
    for block in others:
        (section,) = [section for section in sections if block in section]
        assert re.search(r"^(Not run|Run here)", section, re.MULTILINE), block
