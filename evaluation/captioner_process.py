"""Runs one captioner over images and measures its speed and memory: `python -m vlv.evaluation.captioner_process JOB`.

A process of its own, because the peak memory of a process is that of everything that it has loaded.
"""

import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from vlv.files import read_json, write_json

from .answer_log import end_last_line
from .captioners import EndpointCaptioner, caption_images, caption_notes, find_kind, open_captioner

STEP = "captioned"  # a line of the process for images that are done, followed by their number
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RUNS_FILE = "runs.jsonl"
IN_THIS_PROCESS = ("endpoint", "file")  # kinds whose captioners load no model here


@dataclass(frozen=True)
class CaptionJob:
    """A captioner and the images that it captions. The fields but the last two are those of `open_captioner`.

    Attributes:
        images: Files by name.
        folder: Of the job's files: `captions.jsonl`, which a later run goes on with, and `runs.jsonl`.
    """

    source: str
    kind: str | None
    prompt: str | None
    max_new_tokens: int
    batch_size: int
    dtype: str
    device: str
    endpoint: dict[str, Any]
    images: dict[str, str]
    folder: str


def run_job(job: CaptionJob, advance: Callable[[int], Any] = lambda images: None) -> dict[str, Any]:
    """Captions the images of a job. Captions of an earlier run of the same captioner are kept.

    Args:
        advance: Called with the number of images after each.

    Returns:
        `kind`, `captions` and `failures` by name of the image, `empty` and `cut`, the names of such captions, `notes`
        on them, `fingerprint`, `load_seconds`, `num_new`, the captions of this run, and `num_timed` and `seconds`, the
        captions of all runs and the time that they took.

    Raises:
        Exception: What the captioner raises.
    """
    folder, began = Path(job.folder), perf_counter()
    captioner = open_captioner(
        job.source,
        kind=job.kind,
        prompt=job.prompt,
        max_new_tokens=job.max_new_tokens,
        batch_size=job.batch_size,
        dtype=DTYPES[job.dtype],
        device=job.device,
        log=folder / "answers.jsonl",
        endpoint=job.endpoint,
    )
    load_seconds, kept = perf_counter() - began, 0
    first = True

    def count(images: int) -> None:
        nonlocal first, kept
        if first:  # the captions of an earlier run, before this one begins
            first, kept = False, images
        advance(images)

    images = {name: Path(file) for name, file in job.images.items()}
    totals = None
    if isinstance(captioner, EndpointCaptioner):
        totals = captioner.endpoint.totals
        captioner.on_answer = _AnswerClock(folder, captioner)
    found = caption_images(captioner, images, folder / "captions.jsonl", count)
    captions = {own.name: own.caption for own in found if own.caption is not None}
    timed = [{"num_timed": len(captions), "seconds": sum(own.seconds for own in found if own.caption is not None)}]
    if totals is not None:
        timed = read_runs(folder, captioner.fingerprint)
    return {
        "kind": captioner.kind,
        "fingerprint": captioner.fingerprint,
        "captions": captions,
        "failures": {own.name: own.error for own in found if own.caption is None},
        "empty": [own.name for own in found if own.is_empty],
        "cut": [own.name for own in found if own.is_cut],
        "notes": caption_notes(found, "--max-new-tokens"),
        "load_seconds": load_seconds,
        "num_new": sum(own.caption is not None for own in found) - kept if totals is None else totals.answered,
        "num_timed": sum(run["num_timed"] for run in timed),
        "seconds": sum(run["seconds"] for run in timed),
    }


class _AnswerClock:
    """Writes what an endpoint's answers took into `runs.jsonl` as they come, so that a killed run keeps its speed.

    Requests overlap, so the time of an answer is that since the one before it.
    """

    def __init__(self, folder: Path, captioner: EndpointCaptioner):
        self.folder, self.captioner = folder, captioner
        self.counts, self.since = (0, 0), perf_counter()

    def __call__(self, answers: int) -> None:
        totals, now = self.captioner.endpoint.totals, perf_counter()
        counts = totals.answered, totals.failed
        if counts != self.counts:  # not an answer from the log
            run = {"num_timed": counts[0] - self.counts[0], "seconds": now - self.since}
            add_run(self.folder, self.captioner.fingerprint, run)
            self.counts, self.since = counts, now


def add_run(folder: Path, fingerprint: str, run: Mapping[str, Any]) -> None:
    """Writes what was measured of a run of a captioner, or of a part of one, into `runs.jsonl`."""
    end_last_line(folder / RUNS_FILE)
    with (folder / RUNS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"fingerprint": fingerprint, **run}) + "\n")


def read_runs(folder: Path, fingerprint: str) -> list[dict[str, Any]]:
    """What was measured of the runs of a captioner, in their order. Unfinished lines are passed over."""
    runs = []
    if (folder / RUNS_FILE).exists():
        for line in (folder / RUNS_FILE).read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                runs.append(json.loads(line))
    return [run for run in runs if run["fingerprint"] == fingerprint]


def run_job_apart(job: CaptionJob, advance: Callable[[int], Any] = lambda images: None) -> dict[str, Any]:
    """As `run_job` in a new process, with its `peak_memory` and, on a GPU, `peak_gpu_memory`, both in bytes.

    An endpoint or a file of captions loads no model, so it is asked by this process, and has no peak memory.

    Raises:
        RuntimeError: If the process ends with an error, which is the message.
        Exception: As `run_job`, in this process.
    """
    if (job.kind or find_kind(job.source)) in IN_THIS_PROCESS:
        return run_job(job, advance)
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "job.json", asdict(job))
    (folder / "result.json").unlink(missing_ok=True)
    with (folder / "stderr.txt").open("w+", encoding="utf-8", errors="replace") as errors:
        command = [sys.executable, "-m", __name__, str(folder / "job.json")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            try:
                for line in process.stdout or ():
                    if step := re.fullmatch(rf"{STEP} (\d+)\s*", line):
                        advance(int(step[1]))
            except BaseException:
                process.kill()
                raise
        errors.seek(0)
        last = next((line for line in reversed(errors.read().splitlines()) if line.strip()), "")
    if not (folder / "result.json").exists():
        how = f"was ended by signal {-process.returncode}" if process.returncode < 0 else f"ended with {last!r}"
        raise RuntimeError(f"its process {how}; {folder / 'stderr.txt'} has its output")
    result = read_json(folder / "result.json")
    if "error" in result:
        raise RuntimeError(result["error"])
    return result


def peak_memory() -> int:
    """The most memory that this process has had, in bytes."""
    try:  # getrusage counts the process that started this one, too, until it has replaced its program
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return 1024 * int(re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)[1])  # type: ignore[index]
    except (OSError, TypeError):  # not on Linux
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(path: str) -> None:
    """Runs the job in a file and writes `result.json` beside it."""
    job = CaptionJob(**json.loads(Path(path).read_text(encoding="utf-8")))
    try:
        result = run_job(job, lambda images: print(f"{STEP} {images}", flush=True))
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    result["peak_memory"] = peak_memory()
    if torch.cuda.is_available():
        result["peak_gpu_memory"] = torch.cuda.max_memory_allocated()
    write_json(Path(job.folder) / "result.json", result)


if __name__ == "__main__":
    main(sys.argv[1])
