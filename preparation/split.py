"""Splits images into training, validation and test lists by a hash, so that an image keeps its part for ever."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vlv.files import read_json, to_json
from vlv.train.data.source import UnreadableImage

from .records import Records, file_of, list_entry, reason_of
from .run import FAILED, Run, describe_files

TRAIN, VALIDATION, TEST = "train", "validation", "test"
NAME, CONTENT = "name", "content"


def split(
    records: Records,
    output: str | os.PathLike,
    *,
    validation: float = 0.05,
    test: float = 0.0,
    by: str = NAME,
    seed: int = 0,
    groups: str | os.PathLike | None = None,
    overwrite: bool = False,
    advance: Callable[[int], None] = lambda images: None,
) -> dict[str, Any] | None:
    """Writes `train.jsonl`, `validation.jsonl` and `test.jsonl` into a folder: lists that the trainers read.

    An image goes where a hash of its name (or its content) and the seed says, whatever the other images are: more
    images move none. Files that are empty or do not exist, or that cannot be read for their content, are left out and
    named in `failed.json`. No image is decoded.

    Args:
        output: The folder. Paths in the lists start from it.
        validation, test: Shares of the images.
        by: `"name"` or `"content"`. By content, equal files are in one part.
        groups: `duplicates.json` of `vlv data dedup` of the same source. The images of a group go where the one that
            is kept goes, so that no part has near duplicates of another.

    Returns:
        The counts of the manifest: `train`, `validation`, `test`, `failed`; None if an earlier run has done the same.

    Raises:
        ValueError: If the shares are not shares, the images are not files of their own, `groups` are of another
            source, or the output is of another run.
        OSError: If a list cannot be written.
    """
    if not (0 <= validation < 1 and 0 <= test < 1 and validation + test < 1):
        raise ValueError(f"the shares are {validation:g} and {test:g}; expected numbers from 0 whose sum is below 1")
    if not records.in_files:
        raise ValueError(
            f"{records.description} holds its images in shards or tables, of which no list can be made; split the "
            "images before they are packed, or let the trainer hold a share back by --eval_share"
        )
    if by == CONTENT and groups is not None:
        raise ValueError("groups are of names; split by name with them, or by content without them")
    output = Path(output)
    options = {"validation": validation, "test": test, "by": by, "seed": seed}
    kept_of = {} if groups is None else _read_groups(groups)
    if groups is not None:
        _require_names(records, kept_of, groups)
    inputs = records.identity() | ({} if groups is None else {"groups": describe_files([groups])})
    writes = [rf"({TRAIN}|{VALIDATION}|{TEST})\.jsonl", re.escape(FAILED)]
    with Run("split", output, inputs, options, is_folder=True, overwrite=overwrite, writes=writes) as run:
        if run.finished:
            return None
        counts, failed = Counter({TRAIN: 0, VALIDATION: 0, TEST: 0}), dict[str, str]()
        paths = {part: output / f"{part}.jsonl" for part in counts if part != TEST or test}
        with ExitStack() as stack:
            temporary = {part: stack.enter_context(run.writing(path)) for part, path in paths.items()}
            lists = {part: stack.enter_context(open(path, "wb")) for part, path in temporary.items()}
            for number in range(len(records)):
                record = records.read(number)
                advance(1)
                try:
                    needs_file = by == CONTENT or isinstance(record.image, UnreadableImage)
                    data = file_of(record.image) if needs_file else None
                    if not os.path.getsize(record.image):
                        raise ValueError("the file is empty")
                except (OSError, ValueError) as error:
                    failed[record.name] = reason_of(error)
                    continue
                key = os.fsencode(kept_of.get(record.name, record.name)) if data is None else data
                part = part_of(key, validation, test, seed)
                lists[part].write(to_json(list_entry(records, record, number, output), None) + b"\n")
                counts[part] += 1
        run.write(output / FAILED, to_json(failed) + b"\n")
        total = dict(counts) | {"failed": len(failed)}
        run.finish([*paths.values(), output / FAILED], total)
    return total


def part_of(key: bytes, validation: float, test: float, seed: int) -> str:
    """The part of a name or content: `"test"` below the share of `test`, then `"validation"`, then `"train"`."""
    digest = hashlib.blake2b(key, digest_size=8, key=str(seed).encode()).digest()
    place = int.from_bytes(digest, "big") / 2**64
    return TEST if place < test else VALIDATION if place < test + validation else TRAIN


def _require_names(records: Records, kept_of: Mapping[str, str], groups: str | os.PathLike) -> None:
    """Raises `ValueError` if groups name an image that the source does not have."""
    unknown = {*kept_of, *kept_of.values()}
    unknown.difference_update(records.name(number) for number in range(len(records)))
    if unknown:
        raise ValueError(
            f"{groups} names {min(unknown)!r}, which is not in {records.description}: it is of another source. "
            "Give the source that `vlv data dedup` read, or run it on this one"
        )


def _read_groups(path: str | os.PathLike) -> dict[str, str]:
    """The kept image of each duplicate, by name."""
    groups = read_json(path, "groups")["groups"]
    try:
        return {each["name"]: group["kept"] for group in groups for each in group["duplicates"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the duplicates.json of `vlv data dedup`: it lacks {error}") from error
