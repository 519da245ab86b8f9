"""Damaged image files through `vlv caption`: no traceback, and every file is either captioned or named.

`python -m tests.cli.fuzz_images --count 2000` prints how many were captioned and how many named, and ends with exit
code 1 if a file is missing from both. The files depend on the seed alone.
"""

import argparse
import io
import json
import os
import random
import re
import tempfile
from collections import Counter
from pathlib import Path

from PIL import Image

from ..interpreter import MODULE, run_python

EXAMPLE = Path(__file__).parents[2] / "examples" / "images" / "test-1.png"
FORMATS = {"jpg": "JPEG", "png": "PNG", "gif": "GIF", "webp": "WEBP", "tif": "TIFF", "avif": "AVIF", "bmp": "BMP"}
HEADER = 64  # bytes


def encode(format: str) -> bytes:
    """The example image in a format, with metadata where the format has them."""
    buffer = io.BytesIO()
    with Image.open(EXAMPLE) as image:
        exif = Image.Exif()
        exif[274] = 6  # the orientation
        exif[270] = "a description"
        options = {"exif": exif} if format in ("JPEG", "PNG", "WEBP", "AVIF") else {}
        image.convert("P" if format == "GIF" else "RGB").save(buffer, format=format, **options)
    return buffer.getvalue()


def flip(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 4, 32))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def swap(data: bytearray, rng: random.Random) -> None:
    length = rng.randrange(1, max(2, len(data) // 4))
    a, b = (rng.randrange(len(data) - length + 1) for _ in range(2))
    data[a : a + length], data[b : b + length] = data[b : b + length], data[a : a + length]


def lie(data: bytearray, rng: random.Random) -> None:
    """Overwrites a number in the header, such as a size or an offset, with an extreme one."""
    value = rng.choice((0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, rng.getrandbits(32)))
    size, order = rng.choice((1, 2, 4)), rng.choice(("little", "big"))
    start = rng.randrange(min(HEADER, len(data) - size))
    data[start : start + size] = (value & (256**size - 1)).to_bytes(size, order)


def remove(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.randrange(1, 200)]


def insert(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    data[start:start] = rng.randbytes(rng.randrange(1, 200))


MUTATIONS = (flip, cut, swap, lie, remove, insert)


def write_files(folder: Path, count: int, seed: int) -> list[str]:
    """Writes damaged files, in all formats and damages in turn, and returns their names."""
    originals = {suffix: encode(format) for suffix, format in FORMATS.items()}
    names = []
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        suffix = list(FORMATS)[number % len(FORMATS)]
        data = bytearray(originals[suffix])
        kinds = [MUTATIONS[number // len(FORMATS) % len(MUTATIONS)]]
        kinds += rng.sample(MUTATIONS, rng.randrange(2))
        for mutate in kinds:
            if len(data) > 8:
                mutate(data, rng)
        name = f"{number:05}-{'-'.join(kind.__name__ for kind in kinds)}.{suffix}"
        (folder / name).write_bytes(data)
        names.append(name)
    return names


def check(count: int, seed: int, folder: Path) -> Counter[str]:
    """Captions damaged files with the embedded miniature.

    Returns:
        How many files were captioned and how many named.

    Raises:
        AssertionError: If a file is in neither, or the command ends in another way than it says.
    """
    inputs, output = folder / "in", folder / "captions.json"
    inputs.mkdir()
    names = write_files(inputs, count, seed)
    command = ["vlv.cli.main", "caption", str(inputs), "--output", str(output)]
    command += ["--max-new-tokens", "1", "--device", "cpu"]
    done = run_python(MODULE, command, cwd=Path.cwd(), env=os.environ)
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    assert done.returncode in (0, 1), f"exit code {done.returncode}: {done.stderr[-3000:]}"
    captioned = set(json.loads(output.read_text()))
    named = set(re.findall(r"^cannot read (\S+): .+", done.stderr, re.MULTILINE))
    assert captioned | named == set(names) and not captioned & named, sorted(set(names) - captioned - named)[:5]
    assert done.returncode == bool(named)
    assert max(map(len, done.stderr.splitlines())) < 400
    return Counter(captioned=len(captioned), named=len(named))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="files (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the damages (default: 0)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = check(arguments.count, arguments.seed, Path(temporary))
    print(f"{arguments.count} damaged files: {found['captioned']} captioned, {found['named']} named")
