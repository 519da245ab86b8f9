"""What every step survives: kills at any moment, a full disk."""

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from tqdm import tqdm

from vlv.cli import data
from vlv.cli.main import main
from vlv.preparation.run import Run

from ..evaluation.openai_server import Reply, scripted_endpoint
from ..interpreter import MODULE, run_python
from .inputs import write_downloader, write_metadata, write_pictures, write_urls
from .kill_repeatedly import STEPS


@pytest.mark.slow
def test_kills_at_random_moments_lose_double_and_break_nothing():
    """In a process of its own: it forks."""
    done = run_python(MODULE, ["tests.preparation.kill_repeatedly", "--times=1"], cwd=Path.cwd(), env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r": 1 kills in \d+ runs to the end, 0 problems$", done.stdout, re.MULTILINE)) == len(STEPS)


def test_a_kill_while_a_part_is_written_leaves_no_half_of_it(tmp_path):
    pid = os.fork()
    if not pid:
        with Run("pack", tmp_path, {}, {}, is_folder=True) as run, run.writing(run.progress / "part.json") as file:
            file.write_text("half of")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    with Run("pack", tmp_path, {}, {}, is_folder=True) as run:
        assert not (run.progress / "part.json").exists()
        run.write(run.progress / "part.json", b"{}")
        run.finish([], {})
    assert not run.progress.exists()


def test_a_process_that_has_the_id_of_one_that_was_left_is_not_ended(tmp_path):
    """Nor is it an error if there is none of this id."""
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        with Run("download", tmp_path, {}, {}, is_folder=True) as run:
            run.record_process(process.pid)
        record = tmp_path / ".progress" / "process.json"
        content = json.loads(record.read_text())
        record.write_text(json.dumps(content | {"started": content["started"] - 1}))
        with Run("download", tmp_path, {}, {}, is_folder=True) as run:
            assert process.poll() is None and not record.exists()
            run.record_process(process.pid)
        with Run("download", tmp_path, {}, {}, is_folder=True) as run:
            assert process.wait(10) == -signal.SIGKILL and not record.exists()


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 96 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


COMMANDS = {
    "filter": ["metadata.parquet", "--min-side", "none", "--aspect-ratio", "none", "--max-watermark", "none"],
    "pack": ["pictures", "--pairs", "--shard-images", "5"],
    "pack to parquet": ["pictures", "--format", "parquet", "--shard-images", "5"],
    "inspect": ["pictures", "--thumbnails", "60"],
}


@pytest.mark.parametrize("step", COMMANDS)
def test_a_full_disk_leaves_no_broken_file_and_the_run_goes_on_when_there_is_room(
    tmp_path, small_disk, monkeypatch, capsys, step
):
    write_metadata(tmp_path / "metadata.parquet", 20_000)
    write_pictures(tmp_path / "pictures", 60, side=64)
    monkeypatch.chdir(tmp_path)
    name, source, *options = step.partition(" ")[0], *COMMANDS[step]
    output = "out.parquet" if name == "filter" else "out"
    command = ["data", name, source, *options, "--output"]
    assert main([*command, str(tmp_path / "large" / output)]) == 0
    place = tmp_path / "large" if name == "filter" else tmp_path / "large" / output
    expected = {path.name: path.read_bytes() for path in place.iterdir() if "manifest" not in path.name}
    capsys.readouterr()
    assert main([*command, str(small_disk / output)]) == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said and "Traceback" not in said
    place = small_disk if name == "filter" else small_disk / output
    left = {path.name: path.read_bytes() for path in place.glob("[!.]*") if "manifest" not in path.name}
    assert left.items() <= expected.items() and left != expected
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    assert main([*command, str(small_disk / output)]) == 0
    assert {path.name: path.read_bytes() for path in place.iterdir() if "manifest" not in path.name} == expected


STEP_ARGUMENTS = {
    "filter": ["metadata.parquet", "--output=out.parquet"],
    "filter a sample": ["metadata.parquet", "--output=out.parquet", "--sample=50"],
    "pack": ["pictures", "--output=out", "--shard-images=5"],
    "dedup": ["pictures", "--output=out"],
    "inspect": ["pictures", "--output=out"],
    "split": ["pictures", "--output=out", "--by=content"],
    "recaption": ["pictures", "--output=out.jsonl", "--model=teacher"],
    "download": ["urls.parquet", "--output=out", "--img2dataset=./downloader", "--shard-images=3"],
}


def fill(folder) -> None:
    """Inputs of every step, with an image that cannot be read, and a URL that is gone."""
    write_metadata(folder / "metadata.parquet", 3000)
    write_pictures(folder / "pictures", 7)
    (folder / "pictures" / "bad.png").write_text("no picture")
    write_downloader(folder / "downloader")
    write_urls(folder / "urls.parquet", ["url", "gone", "other", "third", "fourth"])


@pytest.mark.parametrize("step", ["pack", "dedup", "inspect", "split", "download"])
def test_overwrite_removes_what_an_ended_run_has_left_and_no_other_file(tmp_path, monkeypatch, step):
    """The run is ended when all its outputs are there, but not yet in the manifest; another step follows."""
    fill(tmp_path)
    monkeypatch.chdir(tmp_path)

    def end(*arguments):
        raise ValueError("ended")

    with monkeypatch.context() as ended:
        ended.setattr(Run, "finish", end)
        assert main(["data", step, *STEP_ARGUMENTS[step]]) == 2
    left = {path.name for path in Path("out").iterdir()} - {"manifest.json", ".progress"}
    mine = {"teacher.jsonl", "teacher.jsonl.answers.sqlite", "x.png", "my shard-00000.tar"}
    for name in mine:
        Path("out", name).write_text("mine")
    other = "dedup" if step == "inspect" else "inspect"
    assert main(["data", other, *STEP_ARGUMENTS[other], "--overwrite"]) == 1
    found = {path.name for path in Path("out").iterdir()}
    assert mine <= found and all(Path("out", name).read_text() == "mine" for name in mine)
    made = {"kept.jsonl", "duplicates.json", "failed.json"} if step == "inspect" else {"report.json", "report.html"}
    assert found - mine == made | {"manifest.json"} and left - made


@pytest.mark.parametrize("step", STEP_ARGUMENTS)
def test_a_progress_bar_ends_at_its_total(tmp_path, monkeypatch, step):
    """Of every step, with a teacher that says nothing."""
    fill(tmp_path)
    monkeypatch.chdir(tmp_path)
    bars = []

    class Bar(tqdm):
        def __init__(self, **settings):
            super().__init__(**settings | {"disable": False})
            bars.append(self)

    monkeypatch.setattr(data, "tqdm", Bar)
    name, arguments = step.partition(" ")[0], STEP_ARGUMENTS[step]
    with scripted_endpoint(lambda words, times: Reply("" if times == 2 else "a picture with colours")) as script:
        address = [f"--base-url={script.url}"] if name == "recaption" else []
        assert main(["data", name, *arguments, *address]) in (0, 1)
    (bar,) = bars
    expected = {"filter": 3000, "filter a sample": 6000, "download": 5}.get(step, 8)
    assert bar.n == bar.total == expected
