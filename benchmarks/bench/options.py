"""What bfloat16, channels-last memory, a static cache and torch.compile gain on this machine.

    python -m benchmarks.bench.options

Each part of the medium model runs without and with each option, in turns, on one thread (one CUDA card where there is
one). A ratio above 1 says that the option is faster.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers.utils import logging

from vlv.captioning.acceleration import accelerate
from vlv.pipelines import generate_captions

from .measure import in_child, limit_threads, ratios
from .models import Models, build
from .report import machine

OPTIONS = ("bfloat16", "channels-last", "static cache", "compiled")
PARTS = ("vision tower", "encoder", "autoencoder, encoding", "denoiser", "denoiser, backward", "greedy captions")
BATCH, TOKENS = 4, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--options", nargs="*", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--output", type=Path, help="folder of options.md (default: print)")
    arguments = parser.parse_args()
    limit_threads()
    logging.set_verbosity_error()
    found: dict[str, dict[str, str]] = {}
    for part in PARTS:
        for option in arguments.options:
            print(f"{part}: {option}", file=sys.stderr, flush=True)
            found.setdefault(part, {})[option] = in_child(lambda p=part, o=option: compare(p, o, arguments.rounds))[
                "cell"
            ]
    text = as_markdown(found, arguments.options, arguments.rounds)
    if arguments.output is None:
        print(text)
    else:
        (arguments.output / "options.md").write_text(text)


def compare(part: str, option: str, rounds: int) -> dict[str, str]:
    """The ratio plain / with the option, as a cell of the table; where the option has no meaning, a dash."""
    is_of_captions = part == "greedy captions"
    if (option == "channels-last" and is_of_captions) or (option == "static cache" and not is_of_captions):
        return {"cell": "-"}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ways = {"plain": work_of(part, device, None), option: work_of(part, device, option)}
    for work in ways.values():
        work()
        work()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            started = _now(device)
            work()
            times[name].append(_now(device) - started)
    found = ratios(times, "plain", option)
    seconds = median(times["plain"])
    return {"cell": f"{found['median']:.2f} ({found['lowest']:.2f} to {found['highest']:.2f}) of {seconds:.3f} s"}


def work_of(part: str, device: str, option: str | None) -> Callable[[], Any]:
    """A function that runs a part once, with an option."""
    models = build("medium")
    dtype = torch.bfloat16 if option == "bfloat16" else torch.float32
    module, run = _parts(models, part, device, dtype)
    module.to(device, dtype)
    if option == "channels-last":
        module.to(memory_format=torch.channels_last)
    if part == "greedy captions":
        acceleration = accelerate(models.captioner, option == "static cache", option == "compiled")
        return partial(run, **acceleration)
    if option == "compiled":
        module.compile()
    return run


def _parts(models: Models, part: str, device: str, dtype: torch.dtype) -> tuple[Any, Callable[..., Any]]:
    captioner, decoder = models.captioner, models.decoder
    side, latent = models.processor.image_processor.size["height"], models.image_size // 8
    width = models.captioner.config.caption_embed_dim
    torch.manual_seed(0)
    pixels = torch.randn(BATCH, 3, side, side).to(device, dtype)
    images = torch.randn(BATCH, 3, models.image_size, models.image_size).to(device, dtype)
    latents = torch.randn(2 * BATCH, 4, latent, latent).to(device, dtype)
    conditioning = torch.randn(2 * BATCH, 77, width).to(device, dtype).requires_grad_()
    unet: Any = decoder.denoiser

    def no_grad(function: Callable[[], Any]) -> Callable[[], Any]:
        return torch.no_grad()(function)

    def backward() -> None:
        unet(latents[:BATCH], 500, conditioning[:BATCH]).sample.float().sum().backward()

    tower = captioner.model.get_encoder("image")
    embeds = torch.randn(BATCH, 77, width)
    settings = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
    unet.requires_grad_(False)
    return {
        "vision tower": (tower, no_grad(lambda: tower(pixels))),
        "encoder": (captioner.model, no_grad(lambda: captioner.model(pixels))),
        "autoencoder, encoding": (decoder.vae, no_grad(lambda: decoder.vae.encode(images))),
        "denoiser": (unet, no_grad(lambda: unet(latents, 500, conditioning))),
        "denoiser, backward": (unet, backward),
        "greedy captions": (
            captioner,
            lambda **acceleration: generate_captions(
                captioner, models.processor, caption_embeds=embeds, **settings, **acceleration
            ),
        ),
    }[part]


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def as_markdown(found: dict[str, dict[str, str]], options: list[str], rounds: int) -> str:
    about = machine()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{about['cpu']}, {about['instructions']}"
    lines = [
        "# What options gain",
        "",
        f"Written by `python -m benchmarks.bench.options --output benchmarks` on {device}, {about['threads']} thread, "
        f"torch {about['torch']}. The medium model of [report.md](report.md), batches of {BATCH}, {TOKENS} tokens. "
        f"Ratios of the time without and with the option, in turns, {rounds} rounds: median (lowest to highest); "
        "above 1 the option is faster. The seconds are those without it.",
        "",
        f"| part | {' | '.join(options)} |",
        f"| --- |{' --- |' * len(options)}",
    ]
    lines += [f"| {part} | {' | '.join(cells[option] for option in options)} |" for part, cells in found.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
