"""The tables of a run, as Markdown."""

import json
import os
import platform
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import torch
import transformers

from .measure import ratios


def machine() -> dict[str, Any]:
    """Processor and versions."""
    cpu = platform.processor()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "diffusers": diffusers.__version__,
    }


def write_report(folder: Path, results: dict[str, Any]) -> None:
    """Writes `report.json` and `report.md`."""
    (folder / "report.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "report.md").write_text(as_markdown(results))


def as_markdown(results: dict[str, Any]) -> str:
    about = results["machine"]
    lines = [
        "# Each path beside the authors' method",
        "",
        f"Written by `{results['command']}` on {about['cpu']} ({about['cores']} cores, {about['threads']} thread, "
        f"{about['instructions']}), torch {about['torch']}, transformers {about['transformers']}, diffusers "
        f"{about['diffusers']}. float32.",
        "",
        "* **ours**: this library as its commands use it.",
        "* **original**: the authors' method, rebuilt with our modules and the same weights "
        "([`bench/original.py`](bench/original.py)): images prepared one at a time inside the step, captions padded "
        "to 300 tokens, logits at every position, no caches, beams before the prefix is read, 50 ancestral "
        "steps, captions one image at a time where a row does not say otherwise. "
        "What else slows their code, such as hidden states that nobody reads, is left out.",
        "* **floor**: the bare modules on tensors that are ready.",
        "",
        f"The ways take turns, {results['rounds']} rounds. Ratios are of the CPU time of the same round: median "
        "(lowest to highest). *Difference* is that of the results of ours and original: of losses relative, of images "
        "in 0..1, of captions 0 where all are the same words. Peak memory is that of a process of its own, "
        "with its models and libraries.",
    ]
    for size, rows in results["sizes"].items():
        parameters = ", ".join(f"{name} {count:g} M" for name, count in results["parameters"][size].items())
        lines += ["", f"## {size}", "", f"{parameters}.", ""]
        header = ["path", "ours, s an image: CPU, wall", "original / ours", "aim", "ours / floor"]
        header += ["peak MB, ours / original", "difference"]
        lines += [_row(header), _row(["---"] * len(header))]
        for name, found in rows.items():
            lines.append(_row(_cells(name, found, size == "medium")))
        if loads := [found["load"] for found in rows.values()]:
            lines += ["", f"Load of the machine, 1 minute: {min(loads):.1f} to {max(loads):.1f}."]
    lines += ["", "## What the rows are", "", _row(["path", "setting"]), _row(["---"] * 2)]
    settings = {name: found["setting"] for rows in results["sizes"].values() for name, found in rows.items()}
    lines += [_row([name, setting]) for name, setting in settings.items()]
    return "\n".join(lines) + "\n"


def _cells(name: str, found: dict[str, Any], has_aim: bool) -> list[str]:
    cpu = found["cpu"]
    original = ratios(cpu, "original")
    aim = ""
    if has_aim and found["aim"] is not None:
        aim = f"{found['aim']:g}, {'met' if original['median'] >= found['aim'] else 'missed'}"
    floor = _ratio(_inverse(ratios(cpu, "floor"))) if "floor" in cpu else ""
    peak = found.get("peak_mb")
    memory = f"{peak['ours']:,.0f} / {peak['original']:,.0f}" if peak else ""
    difference = "" if found["difference"] is None else f"{found['difference']:.1g}"
    seconds = ", ".join(f"{median(found[kind]['ours']):.4f}" for kind in ("cpu", "wall"))
    return [name, seconds, _ratio(original), aim, floor, memory, difference]


def _inverse(found: dict[str, float]) -> dict[str, float]:
    return {"median": 1 / found["median"], "lowest": 1 / found["highest"], "highest": 1 / found["lowest"]}


def _ratio(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} ({found['lowest']:.2f} to {found['highest']:.2f})"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
