"""Kills `vlv caption --shards` again and again, starts it again each time, and compares it with an unbroken run.

    python -m tests.cli.kill_captioning --times 20

Two kills of three come while a shard is written, at a random one of its steps, and the third at a random time. Every
other run reads images in a process of its own, which is killed with it. Prints a line for each kill and a summary; the
exit code is 1 if a caption was lost, doubled or changed, or a file is incomplete or left over.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlv.captioning import shards as shards_module
from vlv.captioning.shards import ShardWriter
from vlv.cli.main import main as vlv

STEPS = 5  # of a shard: before and after its captions, before and after its errors, after its manifest
LAST_STEP = 2 * STEPS - 1


def build_images(folder: Path, count: int) -> Path:
    """Small images, and one that cannot be read."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{number}.png")
    (folder / "damaged.png").write_text("damaged")
    return folder


def arguments(images: Path, output: Path, shards: int, model: str | None, num_workers: int = 0) -> list[str]:
    settings = {
        "output-dir": output,
        "shards": shards,
        "max-new-tokens": 4,
        "num-workers": num_workers,
        "device": "cpu",
    }
    options = [f"--{name}={value}" for name, value in settings.items()]
    return ["caption", str(images), *options, *([f"--model={model}"] if model else [])]


def kill_at(step: int) -> None:
    """From here on, this process kills itself and its children at a step of the shards that it writes, from 1 on."""
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1
        if steps == step:
            os.killpg(0, signal.SIGKILL)

    def add(self: ShardWriter, rows: Sequence[Any], inner: Callable[..., None] = ShardWriter.add) -> None:
        count()
        inner(self, rows)
        count()

    def write_manifest(path: Path, content: Any, inner: Callable[..., None] = shards_module.write_json) -> None:
        inner(path, content)
        if path.name.startswith("shard-"):
            count()

    ShardWriter.add, shards_module.write_json = add, write_manifest


def start(command: Sequence[str], log: Path, step: int | None = None) -> int:
    """Starts a command in a child of this process, which has imported everything; returns its process id.

    Args:
        step: At which it is killed, as of `kill_at`.
    """
    pid = os.fork()
    os.setpgid(pid, pid)  # of the child by itself and by its parent, whichever comes first
    if pid:
        return pid
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 2
    try:
        if step is not None:
            kill_at(step)
        code = vlv(command)
    finally:
        os._exit(code)


def finish(pid: int, log: Path) -> None:
    """Waits for the end of a process, which has named the damaged image."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code not in (0, 1):
        raise RuntimeError(f"the run ended with {code}:\n{log.read_text()[-2000:]}")


def shards_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*.jsonl"))}


def is_writing(folder: Path) -> bool:
    return any(folder.glob(".unfinished-shard-*"))


def kill_and_go_on(folder: Path, times: int, seed: int, model: str | None = None) -> list[str]:
    """Captions once without a break, and once with `times` kills; returns what is wrong."""
    log, images, count = folder / "log.txt", build_images(folder / "images", 2 * (times + 4)), times + 4
    began = time.perf_counter()
    finish(start(arguments(images, folder / "unbroken", count, model), log), log)
    seconds = time.perf_counter() - began
    whole, output = shards_in(folder / "unbroken"), folder / "killed"
    chance, problems, hits = random.Random(seed), [], 0
    for number in range(times):
        before = shards_in(output)
        left = count - len(before)
        at_a_step = number % 3 < 2 and left > 0
        step = chance.randint(1, min(LAST_STEP, STEPS * left)) if at_a_step else None
        pid = start(arguments(images, output, count, model, number % 2), log, step)
        if not at_a_step:
            time.sleep(chance.uniform(0, seconds / 2))
            os.killpg(pid, signal.SIGKILL)
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        hit = at_a_step and ended == -signal.SIGKILL and is_writing(output)
        if at_a_step and not hit:
            problems.append(f"kill {number + 1}: not within a shard; exit code {ended}:\n{log.read_text()[-2000:]}")
        hits += hit
        done = shards_in(output)
        problems += [f"kill {number + 1}: {name} is not whole" for name in done if done[name] != whole[name]]
        problems += [f"kill {number + 1}: {name} is lost" for name in before if name not in done]
        where = f"at step {step} of shards" if at_a_step else "at a random time"
        print(f"kill {number + 1}: {where}, {len(done)} of {count} shards done", flush=True)
    finish(start(arguments(images, output, count, model), log), log)
    problems += compare(output, whole, images)
    problems += [f"{path.name} is left over" for path in output.glob(".unfinished*")]
    print(
        f"{times} kills, {hits} of them while a shard was written; {count} shards with {len(list(images.iterdir()))} "
        "images compared with an unbroken run: "
        + (f"{len(problems)} problems" if problems else "equal, nothing lost or doubled")
    )
    return problems


def compare(output: Path, whole: dict[str, bytes], images: Path) -> list[str]:
    """What is wrong with a run that is done."""
    problems = [] if shards_in(output) == whole else ["the shards differ from those of an unbroken run"]
    merged = output.parent / f"{output.name}.jsonl"
    vlv(["caption", "--merge", str(output), "--output", str(merged), "--overwrite"])
    names = [json.loads(line)["name"] for line in merged.read_text().splitlines()]
    if sorted(names) != sorted(path.name for path in images.iterdir()):
        problems.append("the merged file does not have each image once")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="by default the embedded miniature")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        problems = kill_and_go_on(Path(temporary), options.times, options.seed, options.model)
    for problem in problems:
        print(problem, file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    sys.exit(main())
