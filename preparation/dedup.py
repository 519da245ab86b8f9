"""Finds near duplicates by a perceptual hash, and lists the images that are kept."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vlv.files import to_json

from .duplicates import choose_kept, require_distance
from .records import Records, list_entry
from .run import FAILED, Run
from .scan import scan

KEPT, DUPLICATES = "kept.jsonl", "duplicates.json"


def dedup(
    records: Records,
    output: str | os.PathLike,
    *,
    distance: int = 4,
    workers: int = 1,
    overwrite: bool = False,
    advance: Callable[[int], None] = lambda images: None,
) -> dict[str, Any] | None:
    """Writes `kept.jsonl`, a list that the trainers read, and `duplicates.json`, the groups with their distances.

    Of near images the one with the most pixels is kept, then that with the most bytes, then the first by name. The
    groups are `{"kept": name, "duplicates": [{"name": ..., "distance": bits}]}`. Images in shards or tables have no
    list: `kept.jsonl` then has their names. Images that cannot be read are in neither file, but in `failed.json`.

    Args:
        output: The folder.
        distance: Bits of 64 in which the hashes of near images differ at most; 0 to 8.
        workers: Threads that decode.
        overwrite: Replaces the output of another run.
        advance: Called with numbers of images.

    Returns:
        The counts of the manifest: `images`, `kept`, `duplicates`, `groups`, `failed`; None if an earlier run has done
        the same.

    Raises:
        ValueError: If the distance is out of range, or the output is of another run.
        OSError: If a file cannot be written.
    """
    require_distance(distance)
    output = Path(output)
    options, writes = {"distance": distance}, [re.escape(name) for name in (KEPT, DUPLICATES, FAILED)]
    with Run("dedup", output, records.identity(), options, is_folder=True, overwrite=overwrite, writes=writes) as run:
        if run.finished:
            return None
        failed, rows, hashes, order = dict[str, str](), list[int](), list[int](), list[tuple[int, int, str]]()
        number = 0
        for block in scan(run, records, workers, advance):
            for facts in block:
                if "error" in facts:
                    failed[facts["name"]] = facts["error"]
                else:
                    rows.append(number)
                    hashes.append(int(facts["phash"], 16))
                    order.append((-facts["size"][0] * facts["size"][1], -facts["bytes"], facts["name"]))
                number += 1
        known = np.array(hashes, np.uint64)
        stands = choose_kept(known, np.array(sorted(range(len(rows)), key=order.__getitem__), np.int64), distance)
        is_kept = stands == np.arange(len(rows))
        groups: dict[int, list[dict[str, Any]]] = {}
        for own in np.flatnonzero(~is_kept):
            bits = int(np.bitwise_count(known[own] ^ known[stands[own]]))
            groups.setdefault(int(stands[own]), []).append({"name": order[own][2], "distance": bits})
        named = [{"kept": order[kept][2], "duplicates": groups[kept]} for kept in sorted(groups)]
        with run.writing(output / KEPT) as temporary, open(temporary, "wb") as file:
            for own in np.flatnonzero(is_kept):
                file.write(
                    to_json(list_entry(records, records.read_or_reason(rows[own]), rows[own], output), None) + b"\n"
                )
        run.write(output / DUPLICATES, to_json({"distance": distance, "groups": named}) + b"\n")
        run.write(output / FAILED, to_json(failed) + b"\n")
        counts = {"images": len(records), "kept": int(is_kept.sum()), "duplicates": int((~is_kept).sum())}
        counts |= {"groups": len(groups), "failed": len(failed)}
        run.finish([output / KEPT, output / DUPLICATES, output / FAILED], counts)
    return counts
