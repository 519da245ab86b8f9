"""Objects in images with their boxes: by a model behind an endpoint, or by an object detector of transformers."""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vlv.processing_vlv import to_rgb

from .answer_log import Answer
from .endpoint import Endpoint, EndpointSettings, Question, image_part

OBJECT, BACKGROUND = "object", "background"
BOXES = ("3d", "2d")
THRESHOLD = 0.5  # of an object detector's score, as its pipeline has it
PROMPTS = {
    "3d": "Detect the 3D bounding boxes of the main objects in this image, at most 10. Answer with a JSON list alone. "
    'Each entry has "label", the name of the object in one or two plain words, and "box_3d", [x_center, y_center, '
    "z_center, x_size, y_size, z_size, roll, pitch, yaw], in metres and degrees, as the camera sees it.",
    "2d": "Detect the bounding boxes of the main objects in this image, at most 10. Answer with a JSON list alone. "
    'Each entry has "label", the name of the object in one or two plain words, and "box_2d", [y_min, x_min, y_max, '
    "x_max], from 0 to 1000 in both directions.",
}
_NUMBERS = {"3d": 9, "2d": 4}  # of a box


@dataclass(frozen=True)
class Detection:
    """One object of an image.

    Attributes:
        label: Its name, in lower case.
        centre, size: Of its box: x and y as shares of the image's width and height, or x, y and z in metres.
        angles: Roll, pitch and yaw in radians, of a box in three dimensions.
        kind: `OBJECT`, or `BACKGROUND` for what has a label alone.
    """

    label: str
    centre: tuple[float, ...] = ()
    size: tuple[float, ...] = ()
    angles: tuple[float, ...] = ()
    kind: str = OBJECT


@dataclass(frozen=True)
class Detected:
    """What a detector finds in one image. Either `detections` or `error` is None."""

    detections: list[Detection] | None
    error: str | None = None


class Detector(Protocol):
    """Finds the objects of images.

    Attributes:
        name: For the results.
    """

    name: str

    def detect(self, paths: Sequence[Path], names: Sequence[str] | None = None) -> Iterator[Detected]:
        """What it finds in each image file, in their order.

        Args:
            names: Of the images, each different; by default the names of the files. Answers of an endpoint are kept
                by them.
        """


class PipelineDetector:
    """A model of transformers' pipeline `object-detection`.

    Args:
        source: Folder or repo id.
        threshold: The least score of an object.

    Raises:
        OSError, ValueError: If it cannot be loaded, or detects no objects.
    """

    def __init__(self, source: str, threshold: float = THRESHOLD, device: str = "cpu"):
        from transformers import pipeline  # loads all image processors

        self.pipeline: Any = pipeline(
            "object-detection",
            model=source,
            device=device,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )
        self.threshold, self.name = threshold, f"{self.pipeline.model.config.model_type}: {source}"

    def detect(self, paths: Sequence[Path], names: Sequence[str] | None = None) -> Iterator[Detected]:
        """As `Detector.detect`. Raises `ValueError` if an image cannot be read."""
        for path in paths:
            image = to_rgb(str(path))
            found = self.pipeline(image, threshold=self.threshold)
            yield Detected([_from_corners(own["label"], own["box"], image.width, image.height) for own in found])


def _from_corners(label: str, box: dict[str, float], width: int, height: int) -> Detection:
    centre = (box["xmin"] + box["xmax"]) / 2 / width, (box["ymin"] + box["ymax"]) / 2 / height
    size = (box["xmax"] - box["xmin"]) / width, (box["ymax"] - box["ymin"]) / height
    return Detection(label.strip().lower(), centre, size)


class EndpointDetector:
    """A vision model behind an OpenAI-compatible endpoint, as Gemini in the paper.

    Args:
        log: Where its answers are kept.
        boxes: One of `BOXES`.
    """

    def __init__(self, settings: EndpointSettings, log: Path, boxes: str = "3d"):
        log.parent.mkdir(parents=True, exist_ok=True)
        self.endpoint, self.boxes = Endpoint(settings, log), boxes
        self.name = f"{settings.model}, boxes in {boxes}"

    def detect(self, paths: Sequence[Path], names: Sequence[str] | None = None) -> Iterator[Detected]:
        """As `Detector.detect`.

        Raises:
            EndpointError, PriceReached: As `endpoint.Endpoint.ask`.
        """
        names = [path.name for path in paths] if names is None else names
        questions = (Question(f"detect/{name}", self._messages(path)) for name, path in zip(names, paths, strict=True))
        for answer in self.endpoint.ask(questions):
            yield _read_answer(answer, self.boxes)

    def _messages(self, path: Path) -> list[dict[str, Any]]:
        content = [image_part(path.read_bytes()), {"type": "text", "text": PROMPTS[self.boxes]}]
        return [{"role": "user", "content": content}]


def _read_answer(answer: Answer, boxes: str) -> Detected:
    if answer.text is None:
        return Detected(None, answer.error)
    found = parse_boxes(answer.text, boxes)
    if found is None:
        cut = "; it was cut, raise max_tokens" if answer.finish_reason == "length" else ""
        return Detected(None, f"the answer gives no JSON list of boxes: {answer.text[-80:]!r}{cut}")
    return Detected(found)


def parse_boxes(text: str, boxes: str) -> list[Detection] | None:
    """The objects in a model's answer, or None if it has no JSON list of them.

    Reads a list, with Markdown's fences and words around it, and a list in a field of an object. An entry without a
    label or with another number of values is left out. Sizes are taken without sign.

    Args:
        boxes: `"3d"` for `box_3d` in metres and degrees, `"2d"` for `box_2d` from 0 to 1000.
    """
    entries = _find_list(text)
    if entries is None:
        return None
    found = []
    for entry in entries:
        box = entry.get(f"box_{boxes}")
        label = entry.get("label")
        if not isinstance(label, str) or not isinstance(box, list) or len(box) != _NUMBERS[boxes]:
            continue
        with suppress(TypeError, ValueError):
            values = [float(value) for value in box]
            if all(map(math.isfinite, values)):
                found.append(_to_detection(re.sub(r"\s+", " ", label).strip().lower(), values))
    if entries and not found:
        return None
    return found


def _to_detection(label: str, values: Sequence[float]) -> Detection:
    if len(values) == _NUMBERS["3d"]:
        size = tuple(abs(value) for value in values[3:6])
        return Detection(label, tuple(values[:3]), size, tuple(math.radians(value) for value in values[6:]))
    top, left, bottom, right = (value / 1000 for value in values)
    return Detection(label, ((left + right) / 2, (top + bottom) / 2), (abs(right - left), abs(bottom - top)))


def _find_list(text: str) -> list[dict[str, Any]] | None:
    """The first JSON list of objects in a text; an empty list counts."""
    for match in re.finditer(r"\[(?=\s*[{\]])", text):
        try:
            content, _ = json.JSONDecoder().raw_decode(text, match.start())
        except ValueError:
            continue
        except RecursionError:  # nested too deeply for any reader
            return None
        if all(isinstance(entry, dict) for entry in content):
            return content
    return None


def match_detections(first: Sequence[Detection], second: Sequence[Detection]) -> list[tuple[Detection, Detection]]:
    """Pairs of objects with the same label in two images, the nearest centres first. Each object is in one pair."""
    candidates = sorted(
        (math.dist(one.centre, other.centre), row, column)
        for row, one in enumerate(first)
        for column, other in enumerate(second)
        if one.label == other.label and one.kind == other.kind == OBJECT
    )
    taken: tuple[set[int], set[int]] = set(), set()
    pairs = {}
    for _, row, column in candidates:
        if row not in taken[0] and column not in taken[1]:
            taken[0].add(row)
            taken[1].add(column)
            pairs[row] = first[row], second[column]
    return [pairs[row] for row in sorted(pairs)]


def deviations(one: Detection, other: Detection) -> dict[str, float]:
    """How far two boxes of one object are from each other.

    Returns:
        `centre`, `scale` and `angle`: the mean L1 deviation of the coordinates of the centre, of the sizes, and of the
        angles, the last around the circle and only if both have angles; and `distance`, the Euclidean distance of the
        centres.
    """
    found = {
        "centre": _mean_difference(one.centre, other.centre),
        "scale": _mean_difference(one.size, other.size),
        "distance": math.dist(one.centre, other.centre),
    }
    if one.angles and other.angles:
        turns = [abs(math.remainder(a - b, math.tau)) for a, b in zip(one.angles, other.angles, strict=True)]
        found["angle"] = sum(turns) / len(turns)
    return found


def _mean_difference(first: Sequence[float], second: Sequence[float]) -> float:
    return sum(abs(a - b) for a, b in zip(first, second, strict=True)) / len(first)


def detect_all(
    detector: Detector,
    paths: Sequence[Path],
    names: Sequence[str],
    batch_size: int,
    advance: Callable[[int], Any] = lambda images: None,
) -> list[Detected]:
    """What a detector finds in image files, in batches; `advance` is called with 1 after each image."""
    found = []
    for start in range(0, len(paths), batch_size):
        batch = slice(start, start + batch_size)
        for own in detector.detect(paths[batch], names[batch]):
            found.append(own)
            advance(1)
    return found
