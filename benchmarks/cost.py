"""What the paper's training costs, what dominates, and what saves: prints docs/cost.md.

    python benchmarks/cost.py --output docs/cost.md

Counts full-size models without weights (`vlv.train.estimate`). Takes about three minutes, and needs no GPU.
"""

import argparse
import functools
import json
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from gpu import build_config, full_size

from vlv import reference_configs
from vlv.train import Stage1Config, Stage2Config, configs
from vlv.train.counting import count_step
from vlv.train.estimate import PRICE, UTILIZATION, Estimate, count_training_step, estimate, recipe_beside
from vlv.train.hardware import GPUS, UNET_TRAINING_SPEEDS, gpu_of_device
from vlv.train.parsing import parse_config

MEASURED = Path(__file__).with_name("gpu.json")
RECIPES = Path(configs.__file__).parent
CARDS = 8
PAPER_CARD, PAPER_HOURS, PAPER_BUDGET = "RTX 6000 Ada", 8 * 4 * 24, 1000
COUNTED: dict[Any, Any] = {}


def read(name: str, **settings: Any) -> Any:
    """A recipe of the package with other settings."""
    path = RECIPES / f"{name}.yaml"
    options = [f"--{setting}={value}" for setting, value in {"use_cpu": True, **settings}.items()]
    return parse_config(Stage1Config if name.startswith("stage1") else Stage2Config, [str(path), *options], name)


def cost(name: str, gpu: str = "H100", tf32: bool = False, cached_moments: bool = False, **settings: Any) -> Estimate:
    """The estimate of a recipe on 8 cards. A step is counted once."""
    optimizer = settings.pop("optim", None)
    config = read(name, **settings)
    config.optim = optimizer or config.optim  # only its name matters, so that its package need not be installed
    key = name, cached_moments, tuple(sorted((k, v) for k, v in settings.items() if k != "max_steps"))
    if key not in COUNTED:
        kwargs: dict[str, Any] = {"cached_moments": cached_moments}
        if name.startswith("stage2"):
            kwargs["stage1"] = recipe_beside(RECIPES / f"{name}.yaml", config.model, name)
        COUNTED[key] = count_training_step(config, **kwargs)
    return estimate(config, GPUS[gpu], CARDS, counted=COUNTED[key], tf32=tf32)


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def anchors() -> list[str]:
    """Which share of a card's peak the published trainings of Stable Diffusion 2's UNet reach."""
    unet = reference_configs.diffusion_components("meta")["unet"]
    with torch.device("meta"):
        arguments = torch.empty(1, 4, 64, 64), torch.zeros(1, dtype=torch.long), torch.empty(1, 77, 1024)
    flops = count_step(lambda: unet(*arguments).sample.sum(), {}, [unet]).total()
    rows = [
        [name, f"{speed}", f"{flops / 1e12:.2f}", f"{speed * flops / 1e12:.0f}", f"{GPUS[name].bf16:.0f}"]
        + [f"{speed * flops / 1e12 / GPUS[name].bf16:.0%}"]
        for name, speed in UNET_TRAINING_SPEEDS.items()
    ]
    return table(["card", "images/s", "TFLOP an image", "TFLOP/s", "peak, bf16", "share of the peak"], rows)


@functools.cache
def measured_rows() -> list[dict[str, Any]]:
    """The rows of benchmarks/gpu.json, with estimates for the same settings: `share` of the peak, `bound` in GB."""
    found = json.loads(MEASURED.read_text())
    card = gpu_of_device(found["machine"]["device"])
    assert card is not None, f"{MEASURED} is of a card whose peak train/hardware.py does not have"
    size, rows = full_size(), []
    for stage in (1, 2):
        settings: dict[str, Any] = {}
        for row in found["training"][f"stage {stage}"]:
            if "problem" in row:
                continue
            settings |= row["settings"]
            counted = {name: value for name, value in settings.items() if name not in ("optim", "compile_blocks")}
            with tempfile.TemporaryDirectory() as folder:
                config = build_config(stage, size, counted, "cpu", folder, 1)
            key = stage, tuple(counted.items())
            if key not in COUNTED:
                COUNTED[key] = count_training_step(config)
            config.optim = settings["optim"]
            expected = estimate(config, card, 1, counted=COUNTED[key])
            share = UTILIZATION * sum(expected.seconds.values()) / row["seconds"]
            rows.append(
                {
                    "stage": stage,
                    "bf16": settings.get("bf16", False),
                    "share": share,
                    "bound": expected.memory.total() / 1e9,
                    **row,
                }
            )
    return rows


def measured() -> list[str]:
    rows = [
        [f"{row['stage']}", row["name"], f"{row['images_per_second']:.1f}", f"{row['share']:.0%}"]
        + [f"{row['memory_gb']:.1f}", f"{row['bound']:.1f}"]
        for row in measured_rows()
    ]
    return table(["stage", "settings", "images/s", "share of the peak", "memory, GB", "estimate, at most"], rows)


def paper() -> list[str]:
    """Stage 1 as published, on the paper's cards."""
    rows = []
    for label, steps, tf32, half in (
        ("200,000 steps, float32", 200_000, False, False),
        ("200,000 steps, TF32", 200_000, True, False),
        ("200,000 steps, bfloat16", 200_000, False, True),
        ("20,000 steps, float32", 20_000, False, False),
        ("20,000 steps, bfloat16", 20_000, False, True),
    ):
        found = cost("stage1", PAPER_CARD, tf32=tf32, max_steps=steps, bf16=half)
        needed = found.gpu_hours() * UTILIZATION / PAPER_HOURS
        rows.append([label, f"{found.images() / 1e6:.1f} M", f"{found.gpu_hours():,.0f}", f"{needed:.0%}"])
    return table(["stage 1", "images", f"GPU-hours at {UTILIZATION:.0%}", f"share needed for {PAPER_HOURS}"], rows)


def shares() -> list[str]:
    """TFLOP of each part, and its share of the time in float32 and in bfloat16."""
    full, half = cost("stage1", bf16=False), cost("stage1", bf16=True)
    second = cost("stage2")
    rows = []
    for stage, found in ((1, half), (2, second)):
        for name, part in found.to_dict()["tflop_per_image"].items():
            if part["share_of_time"] < 0.005:
                continue
            in_full = f"{full.to_dict()['tflop_per_image'][name]['share_of_time']:.0%}" if stage == 1 else ""
            figures = [f"{part['forward']:.2f}", f"{part['backward']:.2f}", in_full, f"{part['share_of_time']:.0%}"]
            rows.append([f"{stage}", name.replace("_", " "), *figures])
    header = ["stage", "part", "forward", "backward", "of the time, float32", "of the time, bfloat16"]
    return table(header, rows)


def ladder() -> list[str]:
    """Measures one after the other, each with those before it."""
    base: dict[str, Any] = {"bf16": False, "diffusion_gradient_checkpointing": True, "encoder_image_size": 768}
    steps: list[tuple[str, dict[str, Any]]] = [
        ("the paper's recipe, float32", {}),
        ("TF32 matrix products", {"tf32": True}),
        ("bfloat16 autocast", {"tf32": False, "bf16": True}),
        ("no recomputation in the denoiser", {"diffusion_gradient_checkpointing": False}),
        ("encoder's input 384 x 384, as the crop", {"encoder_image_size": 384}),
        ("autoencoder in bfloat16", {"vae_dtype": "bfloat16"}),
        ("moments of the autoencoder cached", {"vae_dtype": "float32", "cached_moments": True}),
        ("60,000 steps", {"max_steps": 60_000}),
    ]
    rows, first = [], 0.0
    for label, settings in steps:
        base |= settings
        found = cost("stage1", **base)
        first = first or found.dollars()
        memory = found.memory.total() / 1e9
        figures = [f"{found.step.total() / found.batch / 1e12:.2f}", f"{found.images_per_second():,.0f}"]
        price = [f"{found.gpu_hours():,.0f}", f"${found.dollars():,.0f}", f"{found.dollars() / first:.0%}"]
        rows.append([label, *figures, *price, f"{memory:.0f}"])
    header = ["stage 1, each row with those above", "TFLOP an image", "images/s", "GPU-hours", "price", "of the first"]
    return table([*header, "GB a card, at most"], rows)


def second_stage() -> list[str]:
    """Stage 2 with other language models, LoRA, and recomputation."""
    rows = []
    for label, settings in (
        ("Qwen2.5-3B, the paper's recipe", {}),
        (
            "Qwen2.5-3B, activation checkpointing, 8-bit AdamW",
            {"activation_checkpointing": True, "optim": "adamw_torch_8bit"},
        ),
        ("Qwen2.5-3B, LoRA of rank 64", {"lora_rank": 64}),
        ("Qwen2.5-1.5B", {"language_model": "Qwen/Qwen2.5-1.5B"}),
        ("Qwen2.5-0.5B", {"language_model": "Qwen/Qwen2.5-0.5B"}),
    ):
        found = cost("stage2", **settings)
        flops, memory = found.step.total() / found.batch / 1e12, found.memory.total() / 1e9
        rows.append([label, f"{flops:.2f}", f"{found.gpu_hours():,.0f}", f"${found.dollars():,.0f}", f"{memory:.0f}"])
    return table(["stage 2", "TFLOP a pair", "GPU-hours", "price", "GB a card, at most"], rows)


def cheap() -> list[str]:
    rows, total = [], 0.0
    for name in ("stage1_under_300", "stage2_under_300"):
        found = cost(name)
        total += found.dollars()
        memory = f"{found.memory.total() / 1e9:.0f}"
        rows.append(
            [f"`{name}.yaml`", f"{found.steps:,}", f"{found.images() / 1e6:.1f} M", f"{found.hours():.1f}"]
            + [f"{found.gpu_hours():.0f}", f"${found.dollars():.0f}", memory]
        )
    reached = f"${total:.0f} (below $300 from a share of {UTILIZATION * total / 300:.0%} of the peak)"
    rows.append(["both", "", "", "", "", reached, ""])
    return table(["recipe", "steps", "images", "hours on 8 H100", "GPU-hours", "price", "GB a card, at most"], rows)


def other_cards() -> list[str]:
    rows = []
    for gpu in GPUS.values():
        found = [cost(name, gpu.name) for name in ("stage1_under_300", "stage2_under_300")]
        hours = sum(row.gpu_hours() for row in found)
        fits = ["yes" if row.memory.total() < gpu.memory * 1e9 else "smaller batches" for row in found]
        rows.append([gpu.name, f"{hours:,.0f}", f"${300 / hours:.2f}", *fits])
    return table(["card", "GPU-hours", "below $300 at an hourly price of", "stage 1 fits", "stage 2 fits"], rows)


def verdict() -> str:
    """Whether the paper's figures are plausible, with the numbers that decide it."""
    full, half = (cost("stage1", PAPER_CARD, bf16=bf16) for bf16 in (False, True))
    needed = [found.gpu_hours() * UTILIZATION / PAPER_HOURS for found in (full, half)]
    short = cost("stage1", PAPER_CARD, bf16=False, max_steps=20_000)
    h100 = cost("stage1", bf16=True).dollars() + cost("stage2").dollars()
    return (
        f"The paper states {PAPER_HOURS} GPU-hours (8 {PAPER_CARD}, 4 days), less than 1,000 GPU-hours and less "
        f"than ${PAPER_BUDGET:,}, with 200,000 steps of 512 images in float32. In float32 so many steps in these "
        f"hours need {needed[0]:.0%} of what the cards can do at most, so this cannot be what was run. In bfloat16 "
        f"they need {needed[1]:.0%}, which is more than published trainings reach (below) and leaves no room for "
        "stage 2. The authors' script decays the learning rate within 20,000 steps: so many steps take "
        f"{short.gpu_hours():,.0f} GPU-hours in float32 at {UTILIZATION:.0%} of the peak, which fits the figures. "
        f"The complete recipe in bfloat16 costs ${h100:,.0f} on 8 H100 at ${PRICE:.2f} an hour, both stages together."
    )


PAGE = """# What a training costs

Every number on this page is printed by `python benchmarks/cost.py --output docs/cost.md`, which needs no GPU. `vlv
estimate CONFIG.yaml --gpu H100 --count 8` prints the same for any configuration, with the FLOPs and the time of each
part and the memory of one card. Dollars are at ${price:.2f} for a card and an hour, and speeds at {share:.0%} of the
card's peak, unless a table says otherwise. None of these trainings has been run at full size here.
[`training.md`](../benchmarks/training.md) and [`training_medium.md`](../benchmarks/training_medium.md) have the
estimate beside measured steps of smaller models.

## Is the paper's price plausible?

{verdict}

{paper}

Float32 convolutions use TF32, as PyTorch does by default, and matrix products do not, unless the row says TF32. The
share needed is that of the card's peak in the operations' own precision.

## What dominates

TFLOP of one image (stage 1) or pair (stage 2), forward and backward, by the paper's recipes on an H100. Parts below
0.5% are left out.

{shares}

The frozen vision tower is the largest part of stage 1. Its cost, and that of the transformer's encoder, depends on the
size of the encoder's input: the authors crop to 384 x 384 pixels and enlarge the crop to 768 x 768, which adds no
detail. In bfloat16 the autoencoder's encoder, which stays in float32, is nearly as expensive. In stage 2 the language
model dominates.

## What saves

{ladder}

Cached moments are computed once for each image: with {passes:.1f} passes over the paper's 40 M images they save what
the later passes would have cost. The row before it saves most of the same for nothing, where the autoencoder does not
overflow in bfloat16. Fewer steps are fewer images: their effect on quality at full size is not known.

{second_stage}

## A recipe below $300

[`stage1_under_300.yaml`](../train/configs/stage1_under_300.yaml) and
[`stage2_under_300.yaml`](../train/configs/stage2_under_300.yaml): bfloat16, the encoder's input at the size of the
crop, 60,000 steps, and Qwen2.5-1.5B. A test holds their price. Nothing is cached.

{cheap}

The same on other cards, eight of them:

{other_cards}

## What the share of the peak stands on

Published trainings of Stable Diffusion 2's UNet on cached latents of 512 x 512 images: 135 to 145 images a second and
H100 in MLPerf Training 4.1, and MosaicML's 36 for an A100. With the FLOPs that the same counter counts:

{anchors}

A plain stack reaches less: published training of a ControlNet on an A100 went from 11.7 to 27.2 images a second by
fused attention, channels-last memory, compilation and a larger batch. `--utilization` sets the share,
also of one part alone.

This project's own steps at full size reach less than that, too ([`benchmarks/gpu.md`](../benchmarks/gpu.md), one
{card}, {batches} images a step; each row has the settings of those above it). Here the share is of the peak of each
operation's own precision, as in all estimates. Memory is beside the bound that `vlv estimate` gives:

{measured}

With the largest share of stage 1 in bfloat16 in place of {share:.0%}, what is above costs {factor:.1f} times as much.

## What is counted, and what is not

* FLOPs: `torch.utils.flop_counter` on the meta device, in a real forward and backward pass: what is frozen has no
  weight gradients, what comes before everything trained has no backward pass, and checkpointed layers run twice. Fused
  attention computes its scores again in the backward pass, which is counted. Masked positions are counted.
* Time: FLOPs by the peak of their kind and precision, times the share. Peaks are those of NVIDIA's data sheets:
  dense bfloat16 with float32 sums, TF32, and float32 of the CUDA cores.
* Memory: storages of all tensors alive in that pass, with weights, gradients, AdamW's two moments and DDP's buckets.
  A bound: all states count as present at the peak of the activations. The CUDA context, workspaces and fragmentation
  are not counted, often 1 to 3 GB. Sharding (FSDP, ZeRO) is not counted.
* Not counted: validation, saving, waiting for data, communication, restarts, storage, and the captions of stage 2.
"""


def page() -> str:
    """The page, with every table computed."""
    blocks = (paper, shares, ladder, second_stage, cheap, other_cards, anchors, measured)
    found = json.loads(MEASURED.read_text())
    return PAGE.format(
        card=found["machine"]["device"],
        batches=" and ".join(str(found["batches"][f"stage {stage}"]) for stage in (1, 2)),
        factor=UTILIZATION / max(row["share"] for row in measured_rows() if row["stage"] == 1 and row["bf16"]),
        price=PRICE,
        share=UTILIZATION,
        passes=read("stage1").max_steps * 512 / 40e6,
        verdict="\n".join(textwrap.wrap(verdict(), 118, break_on_hyphens=False)),
        **{block.__name__: "\n".join(block()) for block in blocks},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the page here, too")
    options = parser.parse_args()
    logging.set_verbosity_error()
    text = page()
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
