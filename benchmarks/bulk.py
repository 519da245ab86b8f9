"""Captions in bulk: shards beside bare `generate` on ready tensors, and the memory of many small pictures.

    python -m benchmarks.bulk --output benchmarks/bulk.md
    python -m benchmarks.bulk --pictures 10000 100000 --output benchmarks/bulk_memory.md

The first measures `vlv caption --shards` from image files to a finished shard, with one process that reads images,
and `generate` on the same images as tensors that are ready, in turns. The start of the process that reads is part of
the time, so that few images make the share smaller than that of a shard of thousands: by default there are so many
that a round takes some ten seconds. Wall-clock time needs a core for each of the two processes; the CPU time of the
process with the model is what other programs on the machine change little. The second captions pictures of 48 pixels
in shards of 1,000, and records the peak memory of the process with the model and of the process that reads; bare
`generate` on such pictures as ready tensors runs before and after it. Both compute on one thread.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from PIL import Image

from vlv import hub
from vlv.captioning.captioner import Captioner, CaptionSettings
from vlv.captioning.sharded import ShardCaptioner, ShardJob
from vlv.captioning.shards import ShardFolder
from vlv.cli.main import main as vlv
from vlv.miniature.data import SceneDataset
from vlv.pipelines import generate_captions

from .bench.measure import in_child
from .bench.models import SIZES, build, write_files

TOKENS = {"tiny": 64, "miniature": 64, "medium": 32}
IMAGES = {"tiny": 512, "miniature": 512, "medium": 32}
BATCH_SIZE = 8
PICTURES_IN_A_SHARD = 1000
DISTINCT_PICTURES = 500
BARE_PICTURES = 10_000
NEW_TOKENS, PICTURES_IN_A_BATCH = 4, 64
CAPTION = """
import json, resource, sys, time
from vlv.cli.main import main
since = time.perf_counter()
found = {"code": main(json.loads(sys.argv[1])), "seconds": time.perf_counter() - since}
for name, who in (("model", resource.RUSAGE_SELF), ("reader", resource.RUSAGE_CHILDREN)):
    found[f"{name}_mb"] = resource.getrusage(who).ru_maxrss / 1024
print(json.dumps(found))
"""
"""What a process of its own does, whose memory is measured: a child of this one would begin with this one's."""


def measure_size(size: str, images: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of wall-clock and CPU time of each round, for `generate` (bare) and for shards."""
    models = build(size)
    settings = CaptionSettings(max_new_tokens=TOKENS[size])
    captioner = Captioner(models.captioner, models.processor, settings)
    job = ShardJob("unused", "float32", "cpu", settings, batch_size=BATCH_SIZE, num_workers=1)
    times: dict[str, list[float]] = {f"{way} {kind}": [] for way in ("bare", "shards") for kind in ("wall", "cpu")}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = write_files(folder / "images", images, models)
        pixels = [models.processor.image_processor(str(path), return_tensors="pt").pixel_values for path in paths]
        batches = [torch.cat(pixels[start : start + BATCH_SIZE]) for start in range(0, images, BATCH_SIZE)]

        def bare(number: int) -> None:
            for batch in batches:
                generate_captions(
                    models.captioner, models.processor, pixel_values=batch, max_new_tokens=TOKENS[size], num_beams=1
                )

        def shards(number: int) -> None:
            run = {"shards": 1, "model": size, "fingerprint": size, "settings": {}, "inputs": []}
            output = ShardFolder.begin(folder / f"out-{number}", [str(folder / "images")], run)
            ShardCaptioner(job, captioner).caption(output, 0)

        bare(0)
        for number in range(rounds):
            ways: list[tuple[str, Callable[[int], None]]] = [("bare", bare), ("shards", shards)]
            for way, function in ways[:: 1 if number % 2 else -1]:
                wall, cpu = time.perf_counter(), time.process_time()
                function(number)
                times[f"{way} cpu"].append(time.process_time() - cpu)
                times[f"{way} wall"].append(time.perf_counter() - wall)
    return times


def measure_bare(folder: Path, size: str, count: int) -> dict[str, float]:
    """The rate of `generate`, images/s, on `count` ready tensors, a few of them again and again."""
    models = build(size)
    paths = sorted((folder / "images").glob("*.jpg"))[:DISTINCT_PICTURES]
    pixels = torch.cat([models.processor.image_processor(str(p), return_tensors="pt").pixel_values for p in paths])
    batches = [
        pixels[torch.arange(s, s + PICTURES_IN_A_BATCH) % len(pixels)]
        for s in range(0, len(pixels), PICTURES_IN_A_BATCH)
    ]
    done, since = 0, time.perf_counter()
    while done < count:
        batch = batches[done // PICTURES_IN_A_BATCH % len(batches)]
        generate_captions(
            models.captioner, models.processor, pixel_values=batch, max_new_tokens=NEW_TOKENS, num_beams=1
        )
        done += len(batch)
    return {"rate": done / (time.perf_counter() - since)}


def measure_pictures(count: int, size: str) -> dict[str, float]:
    """Peak memory in MB and seconds of captioning small pictures in shards, and the rate of bare `generate`."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = build(size)
        hub.export(folder / "model", captioner=models.captioner, processor=models.processor)
        del models
        write_pictures(folder / "images", count)
        shards = max(count // PICTURES_IN_A_SHARD, 1)
        options = {"model": folder / "model", "shards": shards, "output-dir": folder / "out", "num-workers": 1}
        options |= {"max-new-tokens": NEW_TOKENS, "batch-size": PICTURES_IN_A_BATCH, "device": "cpu"}
        options |= {"encoder-batch-size": PICTURES_IN_A_BATCH}

        def bare() -> float:
            return in_child(lambda: measure_bare(folder, size, min(count, BARE_PICTURES)))["rate"]

        before = bare()
        command = ["caption", str(folder / "images"), *(f"--{name}={value}" for name, value in options.items())]
        done = subprocess.run(
            [sys.executable, "-c", CAPTION, json.dumps(command)], stdout=subprocess.PIPE, check=True, text=True
        )
        found = json.loads(done.stdout)
        found["bare"] = (before + bare()) / 2
        merged = folder / "merged.jsonl"
        found["merge_mb"] = in_child(lambda: _merge(folder / "out", merged))["mb"]
        with open(merged, encoding="utf-8") as file:
            found["rows"] = sum(1 for _ in file)
    if found["code"] or found["rows"] != count:
        raise RuntimeError(f"{found['rows']:.0f} of {count} pictures were captioned")
    return found


def _merge(shards: Path, output: Path) -> dict[str, float]:
    vlv(["caption", "--merge", str(shards), "--output", str(output)])
    return {"mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def write_pictures(folder: Path, count: int) -> None:
    """Rendered pictures of 48 pixels; after `DISTINCT_PICTURES` the same ones under other names, as hard links."""
    folder.mkdir(parents=True)
    scenes = SceneDataset(min(count, DISTINCT_PICTURES), fields=("pixels",))
    for number in range(len(scenes)):
        pixels = ((scenes[number]["pixels"] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).resize((48, 48)).save(folder / f"{number:07}.jpg")
    for number in range(len(scenes), count):
        os.link(folder / f"{number % len(scenes):07}.jpg", folder / f"{number:07}.jpg")


def throughput_table(sizes: Sequence[str], wanted: int | None, rounds: int) -> str:
    lines = [
        f"{rounds} rounds in turns; medians. Throughput of shards as a share of bare `generate`.",
        "",
        "| size | images | bare, images/s of CPU time | shards, the same | share, CPU time | share, wall clock |",
        "|---|---|---|---|---|---|",
    ]
    for size in sizes:
        images = wanted or IMAGES[size]
        times = in_child(lambda size=size, images=images: measure_size(size, images, rounds))
        rate = {name: images / median(values) for name, values in times.items()}
        share = {
            kind: median(a / b for a, b in zip(times[f"bare {kind}"], times[f"shards {kind}"], strict=True))
            for kind in ("cpu", "wall")
        }
        cells = [f"{rate['bare cpu']:.1f}", f"{rate['shards cpu']:.1f}", f"{share['cpu']:.0%}", f"{share['wall']:.0%}"]
        lines.append(f"| {size} | {images} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def memory_table(counts: Sequence[int], size: str) -> str:
    lines = [
        f"Pictures of 48 pixels, model `{size}`, {NEW_TOKENS} tokens, shards of {PICTURES_IN_A_SHARD}; bare "
        f"`generate` before and after, on {BARE_PICTURES:,} of them or as many as there are.",
        "",
        "| pictures | seconds | images/s | bare `generate` | share | peak MB, model | reader | merge |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for count in counts:
        found = measure_pictures(count, size)
        rate, bare = count / found["seconds"], found["bare"]
        memory = " | ".join(f"{found[f'{process}_mb']:.0f}" for process in ("model", "reader", "merge"))
        lines.append(
            f"| {count:,} | {found['seconds']:.0f} | {rate:.0f} | {bare:.0f} images/s | {rate / bare:.0%} | {memory} |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--images", type=int, help=f"of each size (default: {IMAGES})")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pictures", nargs="+", type=int, metavar="N", help="measure memory for so many pictures")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.pictures:
        command = f"python -m benchmarks.bulk --pictures {' '.join(map(str, options.pictures))}"
        table = memory_table(options.pictures, "tiny")
    else:
        images = f" --images {options.images}" if options.images else ""
        command = f"python -m benchmarks.bulk{images} --rounds {options.rounds}"
        table = throughput_table(options.sizes, options.images, options.rounds)
    load = os.getloadavg()[0]
    machine = f"{os.cpu_count()} cores ({platform.machine()}), load {load:.0f}, torch {torch.__version__}"
    options.output.write_text(f"# Captions in bulk\n\n`{command}` on {machine}\n\n{table}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
