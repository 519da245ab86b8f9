"""What commands and imports cost before they do anything: `python -m benchmarks.bench.startup`.

Each runs in a new process, in turns; CPU seconds of the process and its children.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from .report import machine

LIBRARIES = "import torch; from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationMixin"
IMAGE = "examples/images/combo-1.png"


def commands(folder: Path) -> dict[str, list[str]]:
    vlv = [sys.executable, "-m", "vlv.cli.main"]
    caption = ["caption", IMAGE, "--output", str(folder / "captions.json"), "--overwrite"]
    return {
        "import torch": [sys.executable, "-c", "import torch"],
        "import torch, and what transformers needs for a captioner": [sys.executable, "-c", LIBRARIES],
        "import vlv": [sys.executable, "-c", "import vlv"],
        "import vlv; vlv.VLVModel": [sys.executable, "-c", "import vlv; vlv.VLVModel"],
        "vlv --help": [*vlv, "--help"],
        "vlv caption --help": [*vlv, "caption", "--help"],
        "vlv train stage1 --help": [*vlv, "train", "stage1", "--help"],
        "vlv caption, one image of the miniature": [*vlv, *caption],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="folder of startup.md (default: print)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        each = commands(Path(folder))
        times: dict[str, list[float]] = {name: [] for name in each}
        for number in range(options.rounds + 1):
            for name, command in each.items():
                seconds = cpu_seconds(command)
                if number:  # the first round reads the files from the disk
                    times[name].append(seconds)
    text = as_markdown(times)
    if options.output is None:
        print(text)
    else:
        (options.output / "startup.md").write_text(text)


def cpu_seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, env=environment, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def as_markdown(times: dict[str, list[float]]) -> str:
    about = machine()
    lines = [
        "# Start-up",
        "",
        f"Written by `python -m benchmarks.bench.startup --output benchmarks` on {about['cpu']}, torch "
        f"{about['torch']}, transformers {about['transformers']}: CPU seconds of a new process, one thread, median of "
        f"{len(next(iter(times.values())))} rounds in turns (lowest to highest).",
        "",
        "| process | CPU seconds |",
        "| --- | --- |",
    ]
    lines += [f"| `{name}` | {median(t):.2f} ({min(t):.2f} to {max(t):.2f}) |" for name, t in times.items()]
    libraries = times["import torch, and what transformers needs for a captioner"]
    caption = times["vlv caption, one image of the miniature"]
    ratio = median(one / other for one, other in zip(caption, libraries, strict=True))
    lines += ["", f"The first caption takes {ratio:.2f} times what importing torch and transformers takes."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
