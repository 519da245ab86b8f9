"""Where the time of a path goes: `python -m benchmarks.bench.profile "stage-2 step" --size medium`.

Runs one way of a path under PyTorch's profiler, prints the shares of the modules and of the operations, and writes a
trace for chrome://tracing or ui.perfetto.dev. It is a module of a package, since a script `profile.py` would hide
Python's own module of that name.
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers.utils import logging

from .measure import WAYS, limit_threads
from .models import SIZES
from .paths import PATHS, open_path

PART = "part: "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", choices=PATHS, metavar="PATH", help=", ".join(PATHS))
    parser.add_argument("--size", choices=SIZES, default="medium")
    parser.add_argument("--way", choices=WAYS, default="ours")
    parser.add_argument("--trace", type=Path, help="write a trace, a .json file")
    parser.add_argument("--operations", type=int, default=12, help="operations in the table (default: 12)")
    options = parser.parse_args()
    limit_threads()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    ways = open_path(options.path, options.size)
    try:
        work = getattr(ways, options.way)
        if work is None:
            raise SystemExit(f"{options.path} has no {options.way}")
        name_parts()
        work()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            work()
    finally:
        for close in ways.close:
            close()
    print(table(profiler.key_averages(), options.operations))
    if options.trace is not None:
        profiler.export_chrome_trace(str(options.trace))


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
