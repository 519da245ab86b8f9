"""Captions small rendered images on two Ray workers, and kills one while it writes a shard.

    python -m tests.cli.kill_ray_worker --images 2000

Needs the extra `[ray]`. Compares the merged file with that of a run without Ray. The exit code is 1 if a caption was
lost, doubled or changed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from vlv.cli.main import main as vlv


def build_images(folder: Path, count: int) -> Path:
    from vlv.miniature.data import SceneDataset

    folder.mkdir()
    scenes = SceneDataset(count, fields=("pixels",))
    for number in range(count):
        pixels = ((scenes[number]["pixels"] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).resize((48, 48)).save(folder / f"{number:05}.jpg")
    return folder


def caption(images: Path, output: Path, shards: int, *options: str) -> list[str]:
    settings = ["--shards", str(shards), "--output-dir", str(output), "--max-new-tokens", "4", "--batch-size", "64"]
    settings += ["--encoder-batch-size", "64", "--device", "cpu", "--num-workers", "0"]
    return ["caption", str(images), *settings, *options]


def kill_a_writer(output: Path, run: subprocess.Popen, done: int) -> str | None:
    """Waits until some shards are done, and kills the process that writes another; returns the shard."""
    while run.poll() is None:
        unfinished = list(output.glob(".unfinished-shard-*"))
        if len(list(output.glob("shard-*.jsonl"))) >= done and unfinished:
            os.kill(int(unfinished[0].name.rpartition("-")[2]), signal.SIGKILL)  # the name ends with its process
            return unfinished[0].name.removeprefix(".unfinished-")[: len("shard-00000-of-00000")]
        time.sleep(0.01)
    return None


def merged(output: Path) -> list[dict]:
    """The rows of the merged shards, by name."""
    file = output.parent / f"{output.name}.jsonl"
    vlv(["caption", "--merge", str(output), "--output", str(file)])
    return sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda row: row["name"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--shards", type=int, default=20)
    parser.add_argument("--model", help="by default the embedded miniature")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        images, log = build_images(folder / "images", options.images), folder / "log.txt"
        since = time.perf_counter()
        model = ["--model", options.model] if options.model else []
        command = caption(images, folder / "ray", options.shards, *model, "--engine", "ray", "--ray-actors", "2")
        with open(log, "wb") as file:  # Ray does not start in a fork of a process with threads
            run = subprocess.Popen([sys.executable, "-m", "vlv.cli", *command], stdout=file, stderr=file)
        killed = kill_a_writer(folder / "ray", run, options.shards // 4)
        code = run.wait()
        seconds = time.perf_counter() - since
        print(f"vlv {' '.join(command)}\nkilled while it wrote: {killed}; exit code {code}; {seconds:.0f} s")
        if code:
            print(log.read_text()[-3000:])
            return 1
        counts = [json.loads(path.read_text())["counts"] for path in (folder / "ray").glob("shard-*.json")]
        vlv(caption(images, folder / "alone", options.shards, *model))
        rows, expected = merged(folder / "ray"), merged(folder / "alone")
    names = [row["name"] for row in rows]
    same = rows == expected and len(set(names)) == len(names) == options.images
    print(
        f"{len(counts)} shards, {len(rows)} captions, {len(set(names))} names: "
        + ("equal to a run without Ray, nothing lost or doubled" if same and killed else "DIFFERENT")
    )
    return int(not (same and killed))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
