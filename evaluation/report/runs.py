"""Reads the results that `vlv evaluate` and `vlv score` write, and tells what they are."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..results import RESULTS_FILE

KINDS = {
    "compare": "captioners side by side",
    "generation": "generated images",
    "images": "generated images beside reference images",
    "captions": "captions",
    "judge": "captions judged by a vision model",
    "vqa": "questions answered from captions",
    "score": "diffusion scores of captions",
    "parts": "metrics of each part",
}
WRITTEN_BY = (
    "`vlv evaluate images`, `captions`, `cycle`, `reconstruction`, `spatial`, `composition`, `judge`, `vqa`, "
    "`compare` or `miniature`, or of `vlv score`"
)


@dataclass
class ReportSettings:
    """What a report shows.

    Attributes:
        images: Folder of the evaluated images, where the results do not name it or it has moved.
        captions: File of the captions that `vlv score` scored.
        rank_by: The figure of each image that best and worst cases are chosen by; by default the first of
            `sections.RANKED_BY` that a run has.
        cases: Best cases, and as many worst ones.

    Raises:
        ValueError: If a path does not exist, or `cases` is below 0.
    """

    images: str | None = None
    captions: str | None = None
    rank_by: str | None = None
    cases: int = 8

    def __post_init__(self):
        if self.images is not None and not Path(self.images).is_dir():
            raise ValueError(f"images: {self.images} is not a folder")
        if self.captions is not None and not Path(self.captions).is_file():
            raise ValueError(f"captions: {self.captions} is not a file")
        if self.cases < 0:
            raise ValueError(f"cases is {self.cases}; expected 0 or more")


@dataclass
class Run:
    """The results of one evaluation.

    Attributes:
        name: Of the folder or file.
        kind: One of `KINDS`.
        path: The file.
        content: What it holds.
    """

    name: str
    kind: str
    path: Path
    content: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        config = self.content.get("config")
        return config if isinstance(config, dict) else {}

    def find(self, setting: str) -> Path | None:
        """The file or folder that a setting names: from the working folder, or else beside the results."""
        value = self.config.get(setting)
        if not isinstance(value, str) or not value:
            return None
        return next((path for path in (Path(value), self.path.parent / value) if path.exists()), None)


def read_run(path: str | Path) -> Run:
    """The results in a file, or in the `results.json` of a folder.

    Raises:
        ValueError: If there are none; the message names the path.
    """
    given = Path(path)
    file = given / RESULTS_FILE if given.is_dir() else given
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        missing = f"has no {RESULTS_FILE}" if given.is_dir() else "does not exist"
        raise ValueError(f"{given} {missing}; give results of {WRITTEN_BY}") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{file} is not JSON: {error}") from error
    kind = recognise(content)
    if kind is None:
        raise ValueError(f"{file} is not the results of {WRITTEN_BY}")
    name = file.resolve().parent.name if file.name == RESULTS_FILE else file.stem
    return Run(name, kind, file, content)


def recognise(content: Any) -> str | None:
    """Which of `KINDS` the content of a results file is; None if it is another file."""
    if not isinstance(content, dict) or not content:
        return None
    given = content.get("config")
    config: dict[str, Any] = given if isinstance(given, dict) else {}
    if _is_mapping_of(content.get("captioners"), _is_object):
        return "compare"
    metrics = content.get("metrics")
    if isinstance(metrics, dict) and _is_mapping_of(metrics.get("verdicts"), _is_number):
        return "judge"
    if "questions" in config and _is_mapping_of(metrics, _is_object):
        return "vqa"
    if _is_mapping_of(metrics, is_figure):
        return "captions" if "captions" in config else "images"
    if _is_mapping_of(metrics, lambda group: _is_mapping_of(group, is_figure)):
        return "generation"
    if _is_mapping_of(content, lambda value: _is_number(value) or (isinstance(value, list) and _all_numbers(value))):
        return "score"
    if _is_mapping_of(content, _is_part):
        return "parts"
    return None


def is_figure(value: Any) -> bool:
    """Whether it is a figure as `results.figure` makes it."""
    return isinstance(value, dict) and _is_number(value.get("value")) and isinstance(value.get("label"), str)


def _is_mapping_of(value: Any, test: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(map(test, value.values()))


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_part(value: Any) -> bool:
    """Whether it has numbers, or objects that have."""
    return _is_object(value) and any(_is_number(own) or _is_part(own) for own in value.values())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _all_numbers(values: list) -> bool:
    return bool(values) and all(map(_is_number, values))
