"""Where the time of a path goes: `python -m benchmarks.bench.profile "stage-2 step" --size medium`.

Runs one way of a path under PyTorch's profiler, prints the shares of the modules and of the operations, and writes a
trace for chrome://tracing or ui.perfetto.dev. `--missed benchmarks` profiles the paths of `benchmarks/report.json`
that miss their aim, ours and the original, and writes `benchmarks/profiles.md`. It is a module of a package, since a
script `profile.py` would hide Python's own module of that name.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers.utils import logging

from .measure import WAYS, in_child, limit_threads, ratios
from .models import SIZES
from .paths import PATHS, open_path
from .report import machine

PART = "part: "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", choices=PATHS, metavar="PATH", nargs="?", help=", ".join(PATHS))
    parser.add_argument("--size", choices=SIZES, default="medium")
    parser.add_argument("--way", choices=WAYS, default="ours")
    parser.add_argument("--trace", type=Path, help="write a trace, a .json file")
    parser.add_argument("--operations", type=int, default=12, help="operations in the table (default: 12)")
    parser.add_argument("--missed", type=Path, metavar="FOLDER", help="of report.json; writes profiles.md there")
    options = parser.parse_args()
    if (options.path is None) == (options.missed is None):
        parser.error("give a path, or --missed")
    limit_threads()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.missed is not None:
        report = json.loads((options.missed / "report.json").read_text())
        (options.missed / "profiles.md").write_text(profiles_of_missed(report, options.operations))
        return
    profiler = profile_path(options.path, options.size, options.way)
    print(table(profiler.key_averages(), options.operations))
    if options.trace is not None:
        profiler.export_chrome_trace(str(options.trace))


def profile_path(path: str, size: str, way: str) -> profile:
    """The profile of one run of a way of a path, after another run.

    Raises:
        SystemExit: If the path does not have this way.
    """
    ways = open_path(path, size)
    try:
        work = getattr(ways, way)
        if work is None:
            raise SystemExit(f"{path} has no {way}")
        name_parts()
        work()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            work()
    finally:
        for close in ways.close:
            close()
    return profiler


def profiles_of_missed(report: dict[str, Any], operations: int) -> str:
    """Markdown with the profiles of the medium paths that miss their aim.

    Args:
        report: `report.json`.
        operations: In each table.
    """
    about = machine()
    lines = [
        "# Where the time of the paths goes that miss their aim",
        "",
        "Written by `python -m benchmarks.bench.profile --missed benchmarks` on "
        f"{about['cpu']} ({about['threads']} thread, {about['instructions']}), torch {about['torch']}. "
        "The paths of [report.md](report.md), medium size, one run of each way under PyTorch's profiler, which takes "
        "time itself. Parts include what they call; the backward pass is of all parts.",
    ]
    for name, found in report["sizes"]["medium"].items():
        ratio = ratios(found["cpu"], "original")["median"]
        if found["aim"] is None or ratio >= found["aim"]:
            continue
        lines += ["", f"## {name}: {ratio:.2f} of {found['aim']:g}"]
        for way in ("ours", "original"):
            print(f"{name}: {way}", file=sys.stderr, flush=True)
            text = in_child(lambda n=name, w=way: {"table": _profile_table(n, w, operations)})["table"]
            lines += ["", f"**{way}**: {text}"]
    return "\n".join(lines) + "\n"


def _profile_table(path: str, way: str, operations: int) -> str:
    return table(profile_path(path, "medium", way).key_averages(), operations)


def name_parts() -> None:
    """Makes the forward pass of each part of a model a section of the profile."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, Qwen2ForCausalLM
    from transformers.models.bart.modeling_bart import BartDecoder, BartEncoder
    from transformers.models.florence2.modeling_florence2 import Florence2VisionBackbone

    parts: list[tuple[Any, str, str]] = [
        (Florence2VisionBackbone, "forward", "vision tower"),
        (BartEncoder, "forward", "Florence-2's encoder"),
        (BartDecoder, "forward", "Florence-2's decoder"),
        (CLIPTextModel, "forward", "text encoder"),
        (UNet2DConditionModel, "forward", "denoiser"),
        (AutoencoderKL, "encode", "autoencoder, encoding"),
        (AutoencoderKL, "decode", "autoencoder, decoding"),
        (Qwen2ForCausalLM, "forward", "language model"),
        (torch.Tensor, "backward", "backward pass"),
        (torch.optim.AdamW, "step", "optimiser"),
    ]
    for owner, method, name in parts:
        setattr(owner, method, _section(getattr(owner, method), name))


def _section(function: Any, name: str) -> Any:
    def named(*args: Any, **kwargs: Any) -> Any:
        with record_function(PART + name):
            return function(*args, **kwargs)

    return named


def table(events: Any, count: int) -> str:
    """Shares of the CPU time: of the parts with all that they call, and of the operations by themselves."""
    total = sum(event.self_cpu_time_total for event in events) or 1
    parts = {e.key.removeprefix(PART): e.cpu_time_total / total for e in events if e.key.startswith(PART)}
    operations = Counter({e.key: e.self_cpu_time_total / total for e in events if not e.key.startswith(PART)})
    lines = [f"{total / 1e6:.3f} s", "", "| part | share |", "| --- | --- |"]
    lines += [f"| {name} | {share:.1%} |" for name, share in sorted(parts.items(), key=lambda pair: -pair[1])]
    lines += ["", "| operation | share |", "| --- | --- |"]
    return "\n".join(lines + [f"| {name} | {share:.1%} |" for name, share in operations.most_common(count)])


if __name__ == "__main__":
    main()
