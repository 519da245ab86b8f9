"""Inspects a data set: unreadable files, formats, sizes, duplicates, captions. Writes JSON and one HTML page."""

import base64
import hashlib
import io
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from vlv.files import to_json
from vlv.processing_vlv import to_rgb

from .duplicates import choose_kept, require_distance
from .records import Records, file_of
from .run import Run
from .scan import scan

REPORT, PAGE = "report.json", "report.html"
THUMBNAIL = 144  # pixels
SHOWN_GROUPS, IN_A_GROUP, SHOWN_FAILED = 12, 8, 200
"""Groups of duplicates, their images, and unreadable files on the page; the JSON has all."""
EDGES: dict[str, tuple[float, ...]] = {
    "shorter_side": (0, 64, 128, 256, 384, 512, 768, 1024, 2048),
    "aspect_ratio": (0, 0.5, 0.75, 1, 1.25, 1.5, 2, 3),
    "kilobytes": (0, 10, 30, 100, 300, 1000, 3000),
    "caption_words": (0, 1, 5, 10, 20, 40, 80, 160, 320),
}
"""Lower edges of the bins of histograms; the last bin has no upper edge."""


class Inspection:
    """What is known of the images, block by block."""

    def __init__(self) -> None:
        self.failed: dict[str, str] = {}
        self.formats, self.modes = Counter[str](), Counter[str]()
        self.names: list[str] = []  # of the images that can be read
        self.rows: list[int] = []
        self.hashes: list[int] = []
        self.contents: dict[str, list[int]] = defaultdict(list)  # places in `names` by the hash of the content
        self.values: dict[str, list[float]] = {name: [] for name in EDGES}
        self.captions, self.without_caption, self.total = 0, 0, 0

    def add(self, block: Sequence[Mapping[str, Any]]) -> None:
        """Adds facts of `scan`."""
        for facts in block:
            if "captions" in facts:
                self.captions += len(facts["captions"])
                self.without_caption += not facts["captions"]
                self.values["caption_words"] += [words for words, _ in facts["captions"]]
            if "error" in facts:
                self.failed[facts["name"]] = facts["error"]
            else:
                width, height = facts["size"]
                self.formats[str(facts["format"])] += 1
                self.modes[str(facts["mode"])] += 1
                self.contents[facts["blake2b"]].append(len(self.names))
                self.names.append(facts["name"])
                self.rows.append(self.total)
                self.hashes.append(int(facts["phash"], 16))
                self.values["shorter_side"].append(min(width, height))
                self.values["aspect_ratio"].append(width / height)
                self.values["kilobytes"].append(facts["bytes"] / 1000)
            self.total += 1

    def equal(self) -> list[list[int]]:
        """Places of images whose files are equal, a list for each group."""
        return [group for group in self.contents.values() if len(group) > 1]

    def near(self, distance: int) -> list[list[int]]:
        """Places of images that look alike and whose files differ, the one that would be kept first."""
        hashes = np.array(self.hashes, np.uint64)
        groups: dict[int, list[int]] = {}
        for place, stands in enumerate(choose_kept(hashes, np.arange(len(hashes)), distance)):
            groups.setdefault(int(stands), []).append(place)
        content = {place: key for key, places in self.contents.items() for place in places}
        return [group for group in groups.values() if len({content[place] for place in group}) > 1]

    def report(self, alike: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, Any]:
        """The content of `report.json`; `alike` are groups of places by what they have in common."""
        report: dict[str, Any] = {"images": self.total, "readable": len(self.names), "failed": self.failed}
        report |= {"formats": dict(self.formats.most_common()), "modes": dict(self.modes.most_common())}
        report |= {
            name: _summary(values, EDGES[name])
            for name, values in self.values.items()
            if values or name != "caption_words"
        }
        report |= {
            name: [[self.names[place] for place in group] for group in groups] for name, groups in alike.items()
        }
        if self.captions or self.without_caption:
            report |= {"captions": self.captions, "images_without_caption": self.without_caption}
        return report


def _summary(values: Sequence[float], edges: Sequence[float]) -> dict[str, Any]:
    if not values:
        return {"smallest": None, "median": None, "mean": None, "largest": None, "edges": list(edges), "bins": []}
    array = np.asarray(values, np.float64)
    bins = np.bincount(np.searchsorted(edges, array, side="right") - 1, minlength=len(edges))
    figures = {"smallest": array.min(), "median": np.median(array), "mean": array.mean(), "largest": array.max()}
    return {name: round(float(value), 3) for name, value in figures.items()} | {
        "edges": list(edges),
        "bins": bins.tolist(),
    }


def inspect_images(
    records: Records,
    output: str | os.PathLike,
    *,
    thumbnails: int = 48,
    distance: int = 4,
    workers: int = 1,
    overwrite: bool = False,
    advance: Callable[[int], None] = lambda images: None,
) -> dict[str, Any] | None:
    """Writes `report.json` and `report.html`, one page that needs no other file, into a folder.

    Args:
        output: The folder.
        thumbnails: Images on the page, drawn by a hash of the names.
        distance: Bits of 64 in which the perceptual hashes of near duplicates differ at most.
        workers: Threads that decode.
        overwrite: Replaces the output of another run.
        advance: Called with numbers of images.

    Returns:
        The counts of the manifest: `images`, `failed`, `equal_files` and `near_duplicates` (groups); None if an
        earlier run has done the same.

    Raises:
        ValueError: If the distance is out of range, or the output is of another run.
        OSError: If a file cannot be written.
    """
    require_distance(distance)
    output = Path(output)
    options, writes = {"thumbnails": thumbnails, "distance": distance}, [re.escape(name) for name in (REPORT, PAGE)]
    with Run(
        "inspect", output, records.identity(), options, is_folder=True, overwrite=overwrite, writes=writes
    ) as run:
        if run.finished:
            return None
        inspection = Inspection()
        for block in scan(run, records, workers, advance):
            inspection.add(block)
        alike = {"equal_files": inspection.equal(), "near_duplicates": inspection.near(distance)}
        report = inspection.report(alike)
        run.write(output / REPORT, to_json(report) + b"\n")
        run.write(output / PAGE, _page(records, inspection, report, alike, options).encode("utf-8", "replace"))
        counts = {"images": report["images"], "failed": len(report["failed"])}
        counts |= {name: len(groups) for name, groups in alike.items()}
        run.finish([output / REPORT, output / PAGE], counts)
    return counts


def _page(
    records: Records,
    inspection: Inspection,
    report: Mapping[str, Any],
    alike: Mapping[str, Sequence[Sequence[int]]],
    options: Mapping[str, int],
) -> str:
    from jinja2 import Environment

    def order(place: int) -> bytes:
        return hashlib.blake2b(os.fsencode(inspection.names[place])).digest()

    def show(places: Sequence[int]) -> list[dict[str, Any]]:
        return [_thumbnail(records, inspection.rows[place]) for place in places]

    drawn = sorted(sorted(range(len(inspection.names)), key=order)[: options["thumbnails"]])
    template = Path(__file__).with_name("inspection.html").read_text(encoding="utf-8")
    return (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(template)
        .render(
            source=records.description,
            report=report,
            histograms={name.replace("_", " "): _bars(report[name]) for name in EDGES if name in report},
            failed=list(report["failed"].items())[:SHOWN_FAILED],
            alike={
                name.replace("_", " ").capitalize(): [show(group[:IN_A_GROUP]) for group in groups[:SHOWN_GROUPS]]
                for name, groups in alike.items()
            },
            images=show(drawn),
            distance=options["distance"],
        )
    )


def _bars(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A histogram for the page: a label, a count and a width in percent for each bin, and the figures."""
    edges = [f"{edge:g}" for edge in summary["edges"]]
    labels = [*(f"{low} to {high}" for low, high in pairwise(edges)), f"{edges[-1]} and more"]
    highest = max(summary["bins"], default=0) or 1
    bars = [
        (label, count, round(100 * count / highest)) for label, count in zip(labels, summary["bins"], strict=False)
    ]
    return {"bars": bars, **{name: summary[name] for name in ("smallest", "median", "mean", "largest")}}


def _thumbnail(records: Records, number: int) -> dict[str, Any]:
    """A thumbnail as a data URI, with the name and the captions. It has been read before; a changed file has none."""
    record = records.read_or_reason(number)
    shown = {"name": record.name, "captions": record.captions or [], "uri": ""}
    try:
        image = to_rgb(file_of(record.image))
    except (OSError, ValueError):
        return shown
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=80)
    return shown | {"uri": f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"}
