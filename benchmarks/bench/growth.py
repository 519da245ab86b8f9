"""How the cost of a path grows with one quantity: times, and the exponent of their growth.

Each curve multiplies one quantity and leaves the others alone. The exponent is the slope of the logarithms between the
last two points: 0 where the cost does not depend on the quantity, 1 where it is proportional.
"""

import io
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from vlv.checkpoints import MINIATURE
from vlv.cli.main import main as vlv
from vlv.diffusion_decoder import Conditioning
from vlv.pipelines import generate_captions
from vlv.train import freeze_for_stage1

from .measure import in_child
from .models import build, write_files

ROUNDS = 3


@dataclass
class Curve:
    """One quantity, and the CPU seconds of a piece of work that depends on it.

    Attributes:
        prepare: Of a value and an empty folder, the work.
        measures_itself: The work returns its seconds.
        title, unit: Of the plot.
    """

    title: str
    unit: str
    values: Sequence[int]
    prepare: Callable[[int, Path], Callable[[], Any]]
    measures_itself: bool = False


def _stage1(batch: int = 4, **changes: Any) -> Callable[[], Any]:
    models = build("medium", **changes)
    encoder, decoder = models.captioner.model, models.decoder
    freeze_for_stage1(encoder, "transformer")
    side = models.processor.image_processor.size["height"]
    pixels, images = torch.randn(batch, 3, side, side), torch.rand(batch, 3, models.image_size, models.image_size)

    def step() -> None:
        encoder.zero_grad()
        latents = decoder.encode_images(images * 2 - 1)
        decoder.denoise(latents, Conditioning.of(encoder(pixels))).loss.backward()

    return step


def _captions(images: int = 4, beams: int = 1, tokens: int = 32) -> Callable[[], Any]:
    models = build("medium")
    embeds = torch.randn(images, 77, models.captioner.config.caption_embed_dim)
    settings = {"num_beams": beams, "max_new_tokens": tokens, "min_new_tokens": tokens}
    return lambda: generate_captions(models.captioner, models.processor, caption_embeds=embeds, **settings)


def _bulk(count: int, folder: Path) -> Callable[[], Any]:
    models = build("miniature")
    write_files(folder / "images", count, models)

    def run() -> None:
        with redirect_stderr(io.StringIO()):
            vlv(["caption", str(folder / "images"), "--output", str(folder / "captions.json"), "--overwrite"])

    return run


def _processes(count: int, folder: Path) -> Callable[[], Any]:
    """Steps of stage 1 of the miniature, a batch of 64 for each process, by torch.distributed (gloo).

    The work gives the seconds of 16 steps: those of a run of 20 steps, less those of one of 4.
    """
    write_files(folder / "images", 256, build("tiny"))
    config = folder / "config.yaml"
    config.write_text(
        f"model: {MINIATURE}\ndiffusion_model: {MINIATURE}\nimages: {folder / 'images'}\n"
        "per_device_train_batch_size: 64\nvalidation_steps: 0\nuse_cpu: true\ndisable_tqdm: true\n"
        "save_strategy: 'no'\npre_crop_size: 0\n"
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"] if count > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *launcher, "-m", "vlv.train.stage1", str(config)]

    def seconds(steps: int) -> float:
        started = time.perf_counter()
        options = ["--output_dir", str(folder / f"run-{steps}-{time.monotonic_ns()}"), "--max_steps", str(steps)]
        subprocess.run([*command, *options], env=environment, capture_output=True, check=True)
        return time.perf_counter() - started

    return lambda: seconds(20) - seconds(4)


CURVES = {
    "batch": Curve("Stage 1, images of a batch", "images", (1, 2, 4, 8), lambda n, _: _stage1(batch=n)),
    "image size": Curve(
        "Stage 1, side of the images",
        "pixels",
        (96, 192, 288, 384),
        lambda n, _: _stage1(batch=1, image_size=n, encoder_size=2 * n),
    ),
    "queries": Curve(
        "Stage 1, caption embeddings", "embeddings", (19, 38, 77, 154), lambda n, _: _stage1(batch=2, queries=n)
    ),
    "caption length": Curve("Greedy captions, tokens", "tokens", (16, 32, 64, 128), lambda n, _: _captions(tokens=n)),
    "beams": Curve("Captions, beams", "beams", (1, 2, 4, 8), lambda n, _: _captions(beams=n)),
    "captions in a batch": Curve(
        "Greedy captions of a batch", "images", (1, 4, 16, 32), lambda n, _: _captions(images=n)
    ),
    "images of a folder": Curve("vlv caption, images (miniature)", "images", (64, 256, 1024), _bulk),
    "processes": Curve("16 steps of vlv train stage1", "processes", (1, 2), _processes, measures_itself=True),
}


def measure_growth(names: Sequence[str], folder: Path) -> None:
    """Writes `growth.md` and `growth.png` into a folder."""
    found = {}
    for name in names:
        print(f"growth: {name}", file=sys.stderr, flush=True)
        curve = CURVES[name]
        found[name] = [in_child(lambda curve=curve, value=value: _seconds(curve, value)) for value in curve.values]
    (folder / "growth.md").write_text(_as_markdown(found))
    _plot(found, folder / "growth.png")


def exponent(values: Sequence[int], seconds: Sequence[float]) -> float:
    """Of the growth between the last two points."""
    return math.log(seconds[-1] / seconds[-2]) / math.log(values[-1] / values[-2])


def _seconds(curve: Curve, value: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        work = curve.prepare(value, Path(folder))
        work()
        each = []
        for _ in range(ROUNDS):
            started = time.process_time()
            found = work()
            each.append(found if curve.measures_itself else time.process_time() - started)
    return {"value": value, "seconds": median(each)}


def _as_markdown(found: dict[str, list[dict[str, float]]]) -> str:
    lines = [
        "# How the cost grows",
        "",
        "Written by `python -m benchmarks.bench --sizes --growth --output benchmarks`: the medium model of "
        "[report.md](report.md) with random weights, or the miniature where a row says so; CPU seconds of one thread, "
        f"median of {ROUNDS}; wall-clock seconds for the processes. Stage 1: forward and backward pass. "
        "The exponent is the slope of the logarithms "
        "between the last two points: 1 is proportional.",
        "",
        "| what | seconds | exponent |",
        "| --- | --- | --- |",
    ]
    for name, points in found.items():
        values, seconds = [point["value"] for point in points], [point["seconds"] for point in points]
        each = ", ".join(f"{value}: {second:.3g}" for value, second in zip(values, seconds, strict=True))
        lines.append(f"| {CURVES[name].title} | {each} | {exponent(values, seconds):.2f} |")
    return "\n".join([*lines, "", "![The curves](growth.png)"]) + "\n"


def _plot(found: dict[str, list[dict[str, float]]], path: Path) -> None:
    import matplotlib.pyplot as plt

    columns = min(len(found), 4)
    rows = math.ceil(len(found) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.2 * columns, 2.8 * rows), squeeze=False)
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    for axis, (name, points) in zip(axes.flat, found.items(), strict=False):
        values, seconds = [point["value"] for point in points], [point["seconds"] for point in points]
        axis.loglog(values, seconds, "o-", color="#2a6f97")
        axis.set_xticks(values, map(str, values))
        axis.set_yticks(seconds, [f"{second:.3g}" for second in seconds], fontsize=7)
        axis.minorticks_off()
        axis.set_title(CURVES[name].title, fontsize=8)
        axis.set_xlabel(f"{CURVES[name].unit}; exponent {exponent(values, seconds):.2f}", fontsize=8)
        axis.set_ylabel("seconds", fontsize=8)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
