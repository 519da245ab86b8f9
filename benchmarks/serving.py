"""Measures `vlv serve` beside bare `generate`: `python benchmarks/serving.py`, at the root of a checkout.

Captions the same rendered scenes with the embedded miniature: by `generate` on ready tensors in batches, by requests
one after the other, and by concurrent requests. The three ways take turns; the table has medians. One thread computes.
"""

import argparse
import asyncio
import base64
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import openai
import torch
from PIL import Image

from vlv import hub
from vlv.checkpoints import MINIATURE
from vlv.miniature.data import evaluation_items
from vlv.pipelines import generate_captions


def start_server(log: Path, max_batch: int) -> tuple[subprocess.Popen, str]:
    """The process of `vlv serve` and its address."""
    command = [sys.executable, "-m", "vlv.cli.main", "serve", "--port", "0", "--no-variations"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--max-batch", str(max_batch)], stdout=output, stderr=output, env=environment
        )
    while not (found := re.search(r"at (http://\S+)/v1", log.read_text())):
        if process.poll() is not None:
            raise SystemExit(log.read_text())
        time.sleep(0.1)
    return process, f"{found.group(1)}/v1"


async def ask_all(url: str, images: list[str], concurrent: int) -> list[str]:
    """The captions of data URIs, with so many requests at once."""
    gate = asyncio.Semaphore(concurrent)
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:

        async def ask(image: str) -> str:
            content = [{"type": "image_url", "image_url": {"url": image}}]
            async with gate:
                answer = await client.chat.completions.create(
                    model="vlv-miniature", messages=[{"role": "user", "content": content}], max_tokens=64
                )
            return answer.choices[0].message.content

        return await asyncio.gather(*map(ask, images))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16, help="images of a batch, and concurrent requests")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pixels, _ = evaluation_items("test", options.images)
    scenes = [Image.fromarray(own.permute(1, 2, 0).numpy()) for own in pixels]
    files = [io.BytesIO() for _ in scenes]
    for scene, file in zip(scenes, files, strict=True):
        scene.save(file, format="PNG")
    uris = ["data:image/png;base64," + base64.b64encode(file.getvalue()).decode() for file in files]
    model, processor = hub.load_captioner(MINIATURE)
    pixel_values = processor(images=scenes).pixel_values

    def bare(batch_size: int = options.batch) -> list[str]:
        return [
            caption
            for batch in pixel_values.split(batch_size)
            for caption in generate_captions(model, processor, pixel_values=batch, max_new_tokens=64)
        ]

    with tempfile.TemporaryDirectory() as folder:
        process, url = start_server(Path(folder) / "log", options.batch)
        ways = {
            f"`generate` on ready tensors, batches of {options.batch}": bare,
            "`generate` on ready tensors, one by one": lambda: bare(1),
            "requests one after the other": lambda: asyncio.run(ask_all(url, uris, 1)),
            f"{options.batch} concurrent requests": lambda: asyncio.run(ask_all(url, uris, options.batch)),
            f"{2 * options.batch} concurrent requests": lambda: asyncio.run(ask_all(url, uris, 2 * options.batch)),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        expected = bare()
        try:
            for _ in range(options.repeats):
                for name, run in ways.items():
                    start = time.perf_counter()
                    if run() != expected:
                        raise SystemExit(f"{name}: other captions than bare generate")
                    seconds[name].append(time.perf_counter() - start)
        finally:
            process.terminate()
            process.wait()
    floor = median(next(iter(seconds.values())))
    print("| way | images/s | of bare `generate` |\n|---|---|---|")
    for name, own in seconds.items():
        print(f"| {name} | {options.images / median(own):.1f} | {floor / median(own):.0%} |")


if __name__ == "__main__":
    main()
