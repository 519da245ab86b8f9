"""Kills a training at random moments, resumes it each time, and compares it with an unbroken one.

    python -m tests.train.kill_repeatedly --times 20

The model is tiny and every step is saved, so that kills hit the saving, too. Prints a line for each kill and a
summary; the exit code is 1 if anything was lost or differs.
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

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from vlv import VLVImageProcessor, VLVModel
from vlv.train import stage1, stage2
from vlv.train.checkpoints import find_damage
from vlv.train.trainer import UNFINISHED_FOLDER

STAGES = {"stage1": stage1.main, "stage2": stage2.main}
KEPT = 2


def build_inputs(folder: Path) -> dict[str, str]:
    """A stage-1 model, a language model and captioned images, as the settings of stage 2."""
    from transformers import Qwen2ForCausalLM

    from vlv.miniature.tokenizer import build_tokenizer

    from ..builders import language_model_config, vlv_config

    torch.manual_seed(0)
    VLVModel(vlv_config()).save_pretrained(folder / "model")
    VLVImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder / "model")
    Qwen2ForCausalLM(language_model_config()).save_pretrained(folder / "language-model")
    build_tokenizer(for_text_encoder=False).save_pretrained(folder / "language-model")
    (folder / "pairs").mkdir()
    draw = np.random.default_rng(0)
    for number in range(16):
        Image.fromarray(draw.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / "pairs" / f"{number}.png")
        (folder / "pairs" / f"{number}.txt").write_text(
            "a small dog" if number % 2 else "a large apple at the top left"
        )
    names = {"model": "model", "language_model": "language-model", "pairs": "pairs"}
    return {setting: str(folder / name) for setting, name in names.items()}


def arguments(output_dir: Path, steps: int, inputs: dict[str, str]) -> list[str]:
    settings = {
        "output_dir": output_dir,
        "max_steps": steps,
        "save_steps": 1,
        "save_total_limit": KEPT,
        "logging_steps": 1,
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-3,
        "dataloader_num_workers": 0,
        "validation_steps": 0,
        "use_cpu": True,
        "disable_tqdm": True,
        **inputs,
    }
    return [f"--{name}={value}" for name, value in settings.items()]


def start(stage: str, settings: Sequence[str], log: Path) -> int:
    """Starts a training in a child of this process, which has imported everything; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 1
    try:
        STAGES[stage](settings)
        code = 0
    finally:
        os._exit(code)


def checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints under their final names, by step."""
    return {int(path.name.removeprefix("checkpoint-")): path for path in sorted(folder.glob("checkpoint-*"))}


def progress(folder: Path) -> tuple[int, int | None]:
    """The newest checkpoint, and the inode of the folder of one that is being written, if there is any."""
    unfinished = folder / UNFINISHED_FOLDER
    try:
        inode = unfinished.stat().st_ino
    except FileNotFoundError:
        inode = None
    return max(checkpoints(folder), default=0), inode


def losses(folder: Path) -> dict[int, float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {row["step"]: row["loss"] for row in history if "loss" in row}


def run_to_end(stage: str, settings: Sequence[str], log: Path) -> None:
    """Trains to the end, with one checkpoint at the end."""
    pid = start(stage, [*settings, "--save_steps=1000000"], log)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        raise RuntimeError(f"the training ended with {code}:\n{log.read_text()[-2000:]}")


def wait_for(happened: Callable[[], bool], pid: int) -> float:
    """Waits until something has happened, or a process has ended; returns the time."""
    while not happened() and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.002)
    return time.perf_counter()


def kill_and_resume(folder: Path, stage: str, inputs: dict[str, str], times: int, seed: int) -> list[str]:
    """Trains once without a break, and once with `times` kills; returns what is wrong."""
    steps, log = 3 * times + 2, folder / "log.txt"
    run_to_end(stage, arguments(folder / "unbroken", steps, inputs), log)
    output, settings = folder / "killed", arguments(folder / "killed", steps, inputs)
    chance, problems, reached, kills, hits = random.Random(seed), [], 0, 0, 0
    for number in range(times):
        before = progress(output)
        pid = start(stage, settings, log)
        began = wait_for(lambda before=before: progress(output) != before, pid)  # to save
        if chance.random() < 0.75:
            saved = wait_for(lambda before=before: progress(output)[0] > before[0], pid)
            time.sleep(chance.uniform(0, 2 * (saved - began)))
        else:
            time.sleep(chance.uniform(0, 0.2))
        os.killpg(pid, signal.SIGKILL)
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if ended not in (0, -signal.SIGKILL):
            raise RuntimeError(f"the training ended with {ended}:\n{log.read_text()[-2000:]}")
        kills += ended == -signal.SIGKILL
        unfinished = progress(output)[1]
        saving = unfinished is not None and unfinished != before[1]
        hits += saving
        found = checkpoints(output)
        damages = {path.name: damage for path in found.values() if (damage := find_damage(path)) is not None}
        problems += [f"kill {number + 1}: {name}: {damage}" for name, damage in damages.items()]
        newest = max(found, default=0)
        if newest < reached:
            problems.append(f"kill {number + 1}: step {reached} was saved, and step {newest} is the newest checkpoint")
        reached = newest
        where = "while saving" if saving else "between saves" if ended else "after the end"  # on a busy machine
        print(f"kill {number + 1}: {where}, newest step {newest}", flush=True)
    if not kills:
        problems.append("no kill came before the end of its training; the machine is too busy for this check")
    run_to_end(stage, settings, log)
    expected, got = losses(folder / "unbroken"), losses(output)
    if list(expected) != [*range(1, steps + 1)] or got != expected:
        differ = [step for step in range(1, steps + 1) if got.get(step) != expected.get(step)]
        problems.append(f"the losses differ at steps {differ}")
    for path in sorted((folder / "unbroken").glob("*.safetensors")):
        a, b = load_file(path), load_file(output / path.name)
        if a.keys() != b.keys() or not all(a[name].equal(b[name]) for name in a):
            problems.append(f"the weights in {path.name} differ")
    if left := sorted(path.name for path in output.glob(".*")):
        problems.append(f"the finished run left {left}")
    print(
        f"{kills} kills, {hits} of them while saving; {steps} losses and all weights compared with an unbroken run: "
        + (f"{len(problems)} problems" if problems else "equal, nothing lost, no damaged checkpoint")
    )
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", choices=STAGES, default="stage2")
    parser.add_argument("--inputs", help="settings of the data and models, as JSON; by default they are built")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        inputs = json.loads(options.inputs) if options.inputs else build_inputs(folder)
        problems = kill_and_resume(folder, options.stage, inputs, options.times, options.seed)
    for problem in problems:
        print(problem, file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    sys.exit(main())
