"""Kills the steps of `vlv data` at random moments, runs them again each time, and compares them with unbroken runs.

    python -m tests.preparation.kill_repeatedly --times 20

Prints a line for each step; the exit code is 1 if a record was lost or doubled, or a file was broken at any moment.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pyarrow import parquet

import vlv.preparation.recaption as teacher
from vlv.evaluation.endpoint import EndpointSettings
from vlv.preparation import scan
from vlv.preparation.dedup import dedup
from vlv.preparation.download import FAILED_URLS, DownloadConfig, download
from vlv.preparation.filter import filter_metadata
from vlv.preparation.inspection import inspect_images
from vlv.preparation.pack import pack
from vlv.preparation.records import Records
from vlv.preparation.rules import Rules
from vlv.preparation.split import split

from ..evaluation.openai_server import Reply, scripted_endpoint
from .inputs import write_downloader, write_metadata, write_pictures, write_urls

PICTURES, ROWS, URLS = 90, 60_000, 60
scan.BLOCK = teacher.BLOCK = 8  # so that kills come between blocks, too


def captions(folder: Path, url: str) -> teacher.RecaptionConfig:
    return teacher.RecaptionConfig(EndpointSettings("teacher", base_url=url, concurrency=4, max_retries=0))


STEPS: dict[str, Callable[[Path, Path, str], object]] = {
    "filter": lambda folder, out, url: filter_metadata(
        [folder / "a.parquet", folder / "b.parquet"], out / "out.parquet", Rules(), sample=5000, batch_rows=8192
    ),
    "pack": lambda folder, out, url: pack(Records(str(folder / "pictures"), pairs=True), out, shard_images=5),
    "pack to parquet": lambda folder, out, url: pack(
        Records(str(folder / "pictures"), pairs=True), out, format="parquet", shard_images=None, shard_bytes=9000
    ),
    "dedup": lambda folder, out, url: dedup(Records(str(folder / "pictures")), out),
    "inspect": lambda folder, out, url: inspect_images(Records(str(folder / "pictures")), out, thumbnails=4),
    "split": lambda folder, out, url: split(Records(str(folder / "pictures")), out, validation=0.3, by="content"),
    "download": lambda folder, out, url: download(
        [folder / "urls.parquet"], out, DownloadConfig(shard_images=6, passes=2), program=str(folder / "downloader")
    ),
    "recaption": lambda folder, out, url: teacher.recaption(
        Records(str(folder / "pictures")), out / "captions.jsonl", captions(folder, url)
    ),
}


def start(step: str, folder: Path, out: Path, url: str) -> int:
    """Runs a step in a child of this process, which has imported everything; returns its process id."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            STEPS[step](folder, out, url)
            code = 0
        finally:
            os._exit(code)
    return pid


def visible(folder: Path) -> dict[str, bytes]:
    """The files that are not hidden, without the manifest, whose times differ, and without paid answers."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.glob("[!.]*"))
        if path.is_file() and not path.name.endswith(("manifest.json", ".sqlite"))
    }


def downloaded(folder: Path) -> dict[str, bytes]:
    """The captions in the shards, and the URLs without an image: names of shards have the number of the pass."""
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob("[!.]*.tar")):
        with tarfile.open(path) as shard:
            for member in (member for member in shard if member.name.endswith(".txt")):
                caption = shard.extractfile(member).read()
                times = sum(caption == other for other in found.values())
                found[f"{caption.decode()}, found {times} times before"] = caption
    failed = folder / FAILED_URLS
    return found | ({FAILED_URLS: str(parquet.read_table(failed).to_pylist()).encode()} if failed.exists() else {})


def contents(step: str, folder: Path) -> dict[str, bytes]:
    """What is compared: the bytes of files, but for those whose names differ from run to run."""
    return downloaded(folder) if step == "download" else visible(folder)


def kill_and_resume(step: str, folder: Path, url: str, times: int, chance: random.Random) -> list[str]:
    """Runs a step once without a break, and with `times` kills; returns what is wrong."""
    out, problems, kills, rounds = folder / "out", [], 0, 0
    began = time.perf_counter()
    if os.waitpid(start(step, folder, out, url), 0)[1]:
        return [f"{step} failed"]
    seconds, expected = time.perf_counter() - began, contents(step, out)
    shutil.rmtree(out)
    while kills < times or not rounds or out.exists():
        pid = start(step, folder, out, url)
        ended = 0
        if kills < times:
            time.sleep(chance.uniform(0, seconds))
            ended, status = os.waitpid(pid, os.WNOHANG)
        if kills < times and not ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            kills += 1
            if step != "recaption":  # whose lists grow from run to run
                found = contents(step, out)
                problems += [f"{step}: {name} is broken" for name in found if found[name] != expected.get(name)]
            continue
        status = status if ended else os.waitpid(pid, 0)[1]
        rounds += 1
        if status:
            problems.append(f"{step}: a run after kills failed with {os.waitstatus_to_exitcode(status)}")
        if (found := contents(step, out)) != expected:
            names = [name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)]
            problems.append(f"{step}: {sorted(names)} differ from an unbroken run")
        problems += [f"{step}: left {path.name}" for path in out.glob(".*")]
        shutil.rmtree(out)
    print(f"{step}: {kills} kills in {rounds} runs to the end, {len(problems)} problems", flush=True)
    return problems


def serve() -> tuple[int, str]:
    """A process with a teacher that answers by the size of what it is sent; returns its id and its address."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        with scripted_endpoint(lambda words, times: Reply("a picture with some colours", delay=0.005)) as script:
            os.write(writer, script.url.encode())
            time.sleep(3600)
    os.close(writer)
    with open(reader) as file:
        return pid, os.read(file.fileno(), 200).decode()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    options = parser.parse_args()
    chance, problems = random.Random(options.seed), []
    server, url = serve()
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            write_pictures(folder / "pictures", PICTURES)
            for seed, name in enumerate(("a", "b")):
                write_metadata(folder / f"{name}.parquet", ROWS // 2, seed)
            write_downloader(folder / "downloader")
            write_urls(folder / "urls.parquet", [f"{'gone' if n % 7 == 3 else 'slow'}-{n}" for n in range(URLS)])
            for step in options.steps:
                problems += kill_and_resume(step, folder, url, options.times, chance)
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
    for problem in problems:
        print(problem, file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
