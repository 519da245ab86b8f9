"""The paper's rules for images, by columns of metadata: which rows pass, and why the others do not."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

COLUMNS: dict[str, tuple[str, ...]] = {
    "url": ("url", "URL", "image_url"),
    "caption": ("caption", "TEXT", "text", "top_caption"),
    "width": ("width", "WIDTH", "original_width"),
    "height": ("height", "HEIGHT", "original_height"),
    "watermark": ("pwatermark", "PWATERMARK", "watermark_probability"),
    "aesthetic": ("aesthetic", "AESTHETIC_SCORE", "aesthetic_score", "predicted_aesthetic"),
}
"""Columns by what they hold: the names in LAION's tables, the first that a file has counts."""
PASSES, FAILS, MISSING = 0, 1, 2


@dataclass(frozen=True)
class Rules:
    """Which images are kept. None turns a rule off. The defaults are the paper's (section 4.1).

    Attributes:
        min_side: The shorter side is longer than this, in pixels.
        aspect_ratio: Smallest and largest width / height, both included.
        max_watermark: The probability of a watermark is below this.
        min_aesthetic: The aesthetic score is at least this. The paper states no threshold beyond its parent set's.
        keep_missing: Whether a row passes a rule whose value it lacks.

    Raises:
        ValueError: If the aspect ratios are not in order and above 0.
    """

    min_side: float | None = 512
    aspect_ratio: tuple[float, float] | None = (0.5, 2.0)
    max_watermark: float | None = 0.5
    min_aesthetic: float | None = None
    keep_missing: bool = False

    def __post_init__(self):
        if self.aspect_ratio is not None and not 0 < self.aspect_ratio[0] <= self.aspect_ratio[1]:
            raise ValueError(f"the aspect ratios are {self.aspect_ratio}; expected two numbers above 0 in order")

    def needed(self) -> set[str]:
        """What the rules read, as in `COLUMNS`."""
        needed = {"width", "height"} if self.min_side is not None or self.aspect_ratio is not None else set()
        needed |= {"watermark"} if self.max_watermark is not None else set()
        return needed | ({"aesthetic"} if self.min_aesthetic is not None else set())

    def names(self) -> dict[str, str]:
        """The rules in words, by name, in the order in which they are applied."""
        rules = {
            "shorter_side": self.min_side is not None and f"shorter side > {self.min_side:g}",
            "aspect_ratio": self.aspect_ratio is not None
            and f"aspect ratio {self.aspect_ratio[0]:g} to {self.aspect_ratio[1]:g}",
            "watermark": self.max_watermark is not None and f"watermark probability < {self.max_watermark:g}",
            "aesthetic": self.min_aesthetic is not None and f"aesthetic score >= {self.min_aesthetic:g}",
        }
        return {name: text for name, text in rules.items() if text}

    def apply(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`(rows,)` of `PASSES`, `FAILS` or `MISSING` for each rule.

        Args:
            values: Of `measure`.
        """
        results: dict[str, np.ndarray] = {}
        for name in self.names():
            value = values[name]
            with np.errstate(invalid="ignore"):
                passes = self._passes(name, value)
            results[name] = np.where(np.isnan(value), MISSING, np.where(passes, PASSES, FAILS)).astype(np.int8)
        return results

    def _passes(self, name: str, value: np.ndarray) -> Any:
        if name == "shorter_side":
            return value > self.min_side
        if name == "aspect_ratio":
            lowest, highest = self.aspect_ratio  # type: ignore[misc]
            return (value >= lowest) & (value <= highest)
        if name == "watermark":
            return value < self.max_watermark
        return value >= self.min_aesthetic

    def passing(self, result: np.ndarray) -> np.ndarray:
        """`(rows,)`: whether rows pass a rule."""
        return (result == PASSES) | (self.keep_missing & (result == MISSING))


def measure(columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What rules and histograms look at: `(rows,)` each, NaN where a value is missing or a size is not above 0.

    Args:
        columns: float64 by name as in `COLUMNS`; `caption` holds numbers of characters.
    """
    found = {name: columns[name] for name in ("watermark", "aesthetic") if name in columns}
    if "width" in columns and "height" in columns:
        sizes = [np.where(columns[name] > 0, columns[name], np.nan) for name in ("width", "height")]
        found = {"shorter_side": np.minimum(*sizes), "aspect_ratio": sizes[0] / sizes[1]} | found
    return found | ({"caption_length": columns["caption"]} if "caption" in columns else {})
