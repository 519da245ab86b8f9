"""What a report consists of: sections with tables, charts, and grids of images."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from vlv.image_files import walk_images
from vlv.processing_vlv import to_rgb

from ..matching import match_names

THUMBNAIL = 256  # pixels, of the longer side
LOSSLESS_BELOW = 128  # pixels of the longer side, below which JPEG's blocks are seen


@dataclass
class Table:
    """A table of texts. The first column names the rows."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Chart:
    """A chart.

    Attributes:
        svg: Made by `charts`, which escapes the texts in it.
    """

    title: str
    svg: str


@dataclass
class Case:
    """One image of an evaluation.

    Attributes:
        name: Of the image.
        pictures: Titles and thumbnails, as data URIs; None where there is no file.
        texts: Titles and texts, such as captions.
        values: Titles and figures.
    """

    name: str
    pictures: list[tuple[str, str | None]] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    values: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Grid:
    """Some of the images."""

    title: str
    cases: list[Case]

    @property
    def is_wide(self) -> bool:
        """Whether a case has several pictures or long texts."""
        return any(len(case.pictures) > 1 or len(case.texts) > 2 for case in self.cases)


@dataclass
class Section:
    """One run.

    Attributes:
        title: Unique on the page.
        kind: What was evaluated.
        source: The file of the results.
        summary: The main figure in words.
        settings: Names and values of the run's settings.
        versions: Packages and their versions.
        anchor: The section's id on the page, unique there.
    """

    title: str
    kind: str
    source: str
    summary: str = ""
    tables: list[Table] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    settings: list[tuple[str, str]] = field(default_factory=list)
    versions: list[tuple[str, str]] = field(default_factory=list)
    anchor: str = ""


def thumbnail(path: Path) -> str:
    """A small copy of an image file as a data URI.

    Raises:
        ValueError: If it cannot be read.
    """
    image = to_rgb(path)
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    kind, settings = ("png", {}) if max(image.size) <= LOSSLESS_BELOW else ("jpeg", {"quality": 85})
    image.save(data, kind, **settings)
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"


class Pictures:
    """The image files of a folder by the names that results have, and their thumbnails.

    Args:
        folders: The first that exists is taken.
        files: Relative to that folder, by name; by default all images in it, by their path.
    """

    def __init__(self, folders: Sequence[str | Path | None], files: Mapping[str, str] | None = None):
        self.missing: list[str] = []
        existing = [Path(folder) for folder in folders if folder and Path(folder).is_dir()]
        self.folder = existing[0] if existing else None
        self._files: dict[str, Path] = {}
        if self.folder is not None and files is not None:
            self._files = {name: self.folder / file for name, file in files.items()}
        elif self.folder is not None:
            found = [path for path, problem in walk_images(self.folder) if problem is None]
            self._files = {path.relative_to(self.folder).as_posix(): path for path in found}

    def of(self, name: str) -> str | None:
        """The thumbnail of an image; None if it is not there or cannot be read, which `missing` records."""
        try:
            return thumbnail(self._files[match_names([name], self._files, str(self.folder))[name]])
        except (KeyError, ValueError, OSError):
            self.missing.append(name)
            return None

    @property
    def note(self) -> str | None:
        """What is missing, for readers of the page."""
        if self.folder is None or not self.missing:
            return None
        return f"{len(self.missing)} images are not in {self.folder} or cannot be read, such as {self.missing[0]}"


def number(value: Any) -> str:
    """A figure as text, with four digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def value_of(one: Mapping[str, Any] | None) -> tuple[float, Sequence[float] | None] | None:
    """A figure and the ends of its interval, if there are any; None for one that no chart can show."""
    if one is None or not math.isfinite(float(one["value"])):
        return None
    return float(one["value"]), one.get("interval")


def as_numbers(names: Mapping[str, Any]) -> list[float]:
    """The names of settings as ascending numbers; none if they are not."""
    try:
        found = [float(name) for name in names]
    except ValueError:
        return []
    return found if found == sorted(found) else []


def setting_title(names: Mapping[str, Any]) -> str:
    """What the settings of a run with these names are."""
    return "guidance" if as_numbers(names) else "setting"
