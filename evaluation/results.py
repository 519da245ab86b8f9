"""Results of an evaluation: figures with intervals, the versions that made them, and their table."""

import math
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from vlv.files import write_atomically

from .distances import bootstrap_interval, mean_interval
from .markdown import markdown_table

RESULTS_FILE, TABLE_FILE = "results.json", "results.md"
"""What an evaluation writes into its folder."""
PACKAGES = ("vlv", "torch", "transformers", "diffusers", "torchmetrics", "nltk", "torch-fidelity", "lpips", "dreamsim")
BOOTSTRAP_SAMPLES = 1000


def package_versions() -> dict[str, str]:
    """The installed versions of the packages that compute figures."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def figure(label: str, value: float, interval: Sequence[float] | None = None, **facts: Any) -> dict[str, Any]:
    """One figure of a result: `label`, `value`, the 95% `interval` if there is one, and further facts."""
    ends = {} if interval is None else {"interval": [round(end, 6) for end in interval]}
    return {"label": label, "value": round(value, 6), **ends, **facts}


def mean_figure(label: str, values: Sequence[float], samples: int, **facts: Any) -> dict[str, Any]:
    """The mean of one value for each image, with its bootstrap interval if `samples` is not 0."""
    tensor = torch.as_tensor(values, dtype=torch.float64)
    return figure(label, tensor.mean().item(), mean_interval(tensor, samples) if samples else None, **facts)


def corpus_figure(
    label: str, statistic: Callable[[torch.Tensor], float], num_images: int, samples: int, **facts: Any
) -> dict[str, Any]:
    """A statistic of all images that is not a mean, with its bootstrap interval if `samples` is not 0.

    Args:
        statistic: Maps the indices of images to a value.
    """
    interval = bootstrap_interval(num_images, statistic, samples) if samples else None
    return figure(label, statistic(torch.arange(num_images)), interval, **facts)


def per_image(values: Mapping[str, Sequence[float]], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of each figure, the value of each image by its name. Values that are not finite are left out."""
    return {
        key: {name: round(value, 6) for name, value in zip(names, each, strict=True) if math.isfinite(value)}
        for key, each in values.items()
    }


def ratio_figure(
    label: str, numerators: torch.Tensor, denominators: torch.Tensor, samples: int, **facts: Any
) -> dict[str, Any]:
    """The sum of one column over the sum of another, both `(N,)`, as `corpus_figure`.

    Images whose denominator is 0 say nothing and are not resampled; at least one has another.
    """
    has = denominators > 0
    top, bottom = numerators[has], denominators[has]

    def statistic(rows: torch.Tensor) -> float:
        return (top[rows].sum() / bottom[rows].sum()).item()

    return corpus_figure(label, statistic, len(top), samples, **facts)


def format_figure(one: Mapping[str, Any] | None) -> str:
    """A figure with its interval, as `0.5 (0.4 to 0.6)`; empty if there is none."""
    return "" if one is None else f"{one['value']:.4g}" + (f" ({ends})" if (ends := format_interval(one)) else "")


def format_interval(one: Mapping[str, Any]) -> str:
    """The ends of a figure's interval, as `0.4 to 0.6`; empty if it has none."""
    ends = one.get("interval")
    return f"{ends[0]:.4g} to {ends[1]:.4g}" if ends else ""


def write_table(folder: Path, table: str, name: str = TABLE_FILE) -> None:
    """Writes a table in Markdown into a folder, as `results.md` or by another name."""
    write_atomically(folder / name, lambda path: path.write_text(table + "\n", encoding="utf-8"))


def figures_table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures as a Markdown table with one row for each."""
    rows = [(one["label"], f"{one['value']:.4g}", format_interval(one)) for one in figures.values()]
    return markdown_table(("metric", "value", "95% interval"), rows)
