"""Looks at every image of a source once: format, size, hashes of content and of looks. Goes on where it was ended."""

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from vlv.files import to_json
from vlv.processing_vlv import to_rgb

from .records import Record, Records, file_of, reason_of
from .run import Run

BLOCK = 512
"""Images whose facts are written at a time: what a killed run looks at again at most."""
READ_AHEAD = 4
"""Images in memory at a time for each worker, of sources that hold image files."""
_SIDE, _LOW = 32, 8
_DECIMALS = 6
"""Digits of frequencies that are not rounding errors of float64."""
_FREQUENCIES = np.cos(np.pi * np.arange(_LOW)[:, None] * (2 * np.arange(_SIDE) + 1) / (2 * _SIDE))  # (8, 32): a DCT-II


def perceptual_hash(image: Image.Image) -> int:
    """64 bits of what an image looks like: a pHash, as the library ImageHash makes it but for the rounding.

    The grey image of 32 x 32 pixels is transformed by a DCT; a bit says whether one of the 8 x 8 lowest frequencies is
    above their median. Changes of size, compression and brightness change few bits. They are rounded, since
    most of those of flat images and of gradients in one direction are rounding errors.
    """
    grey = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), dtype=np.float64)
    low = np.round(_FREQUENCIES @ grey @ _FREQUENCIES.T, _DECIMALS)
    return int("".join("01"[bit] for bit in (low > np.median(low)).flatten().astype(int)), 2)


def facts_of(record: Record) -> dict[str, Any]:
    """What is known of an image: `bytes`, `format`, `mode`, `size`, `blake2b`, `phash`, and `captions` if it has some.

    An image that cannot be decoded has `error`, the reason, and no `phash`.
    """
    facts: dict[str, Any] = {"name": record.name}
    if record.captions is not None:
        facts["captions"] = [[len(text.split()), len(text)] for text in record.captions]
    try:
        data = file_of(record.image)
        facts |= {"bytes": len(data), "blake2b": hashlib.blake2b(data, digest_size=16).hexdigest()}
        image = to_rgb(data)  # the reason why it cannot be decoded
        facts |= {"size": list(image.size), "phash": f"{perceptual_hash(image):016x}"}
        with Image.open(io.BytesIO(data)) as opened:
            facts |= {"format": opened.format, "mode": opened.mode}
    except (OSError, ValueError) as error:
        facts["error"] = reason_of(error)
    return facts


def scan(
    run: Run, records: Records, workers: int, advance: Callable[[int], None] = lambda images: None
) -> Iterator[list[dict[str, Any]]]:
    """The facts of all images, as a list for each block in the order of the source.

    Args:
        run: Keeps finished blocks in its `progress`.
        workers: Threads that decode; Pillow lets them run at once.
    """
    with ThreadPoolExecutor(workers) as pool:
        for first in range(0, len(records), BLOCK):
            path = run.progress / f"facts-{first:09d}.json"
            if path.exists():
                facts = json.loads(path.read_bytes())
            else:
                numbers = range(first, min(first + BLOCK, len(records)))
                facts, ahead = [], READ_AHEAD * workers
                for start in range(0, len(numbers), ahead):
                    read = [records.read_or_reason(number) for number in numbers[start : start + ahead]]
                    facts += pool.map(facts_of, read)
                run.write(path, to_json(facts, None))
            yield facts
            advance(len(facts))
