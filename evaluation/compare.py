"""Several captioners on the same images: captions, speed, memory, and figures with paired differences."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from vlv.files import write_json
from vlv.pipelines import DiffusionScorer, load_reconstruction, resized_pixels

from .caption_sets import CaptionSet, Measured
from .captioner_process import CaptionJob, add_run, read_runs, run_job_apart
from .endpoint import EndpointError, PriceReached
from .markdown import markdown_table
from .results import (
    RESULTS_FILE,
    corpus_figure,
    format_figure,
    mean_figure,
    package_versions,
    per_image,
    write_table,
)

CAPTIONS_FILE = "captions.md"


@dataclass
class CaptionerRun:
    """What a captioner did with the images.

    Attributes:
        source, kind: As in `captioners.open_captioner`.
        captions: By name of the image.
        failures: The reasons of images without a caption.
        empty, cut: The names of images whose caption is empty, or cut off at the most tokens as an endpoint says.
        notes: On those.
        error: Why the captioner could not be used, or stopped.
        images_per_second: Of the captions that were made, in this run or an earlier one, without loading the model;
            None if none was.
        load_seconds: To load the model.
        peak_memory_mb, peak_gpu_memory_mb: Of its process, in 10^6 bytes; None if it loads no model here.
    """

    source: str
    kind: str | None = None
    captions: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    empty: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: str | None = None
    images_per_second: float | None = None
    load_seconds: float | None = None
    peak_memory_mb: float | None = None
    peak_gpu_memory_mb: float | None = None

    def facts(self) -> dict[str, Any]:
        """For the results: all but the captions and notes."""
        own = {key: value for key, value in asdict(self).items() if key not in ("captions", "notes")}
        counts = {"num_captioned": len(self.captions), "num_failed": len(self.failures)}
        return own | counts | {"num_empty": len(self.empty), "num_cut": len(self.cut)}


def run_captioner(
    job: CaptionJob,
    advance: Callable[[int], Any] = lambda images: None,
    run: Callable[..., dict[str, Any]] = run_job_apart,
) -> CaptionerRun:
    """Captions the images of a job. A captioner that fails has an `error`, and no exception is raised.

    Args:
        advance: Called with the number of images after each.
        run: `run_job_apart`, or `run_job` to stay in this process.
    """
    found = CaptionerRun(job.source, job.kind)
    try:
        result = run(job, advance)
    except (ImportError, OSError, ValueError, RuntimeError, EndpointError, PriceReached) as error:
        found.error = str(error) if job.source in str(error) else f"{job.source}: {error}"
        return found
    for key in ("kind", "captions", "failures", "empty", "cut", "notes"):
        setattr(found, key, result[key])
    if not found.captions:
        reason = next(iter(found.failures.values()), "there are no images")
        found.error = f"it captioned no image: {reason}"
    if found.kind != "file":
        _measure(found, result, Path(job.folder))
    return found


def _measure(found: CaptionerRun, result: Mapping[str, Any], folder: Path) -> None:
    """Sets speed and memory from this run and the earlier ones of the same captioner."""
    if result["num_timed"] and result["seconds"]:
        found.images_per_second = round(result["num_timed"] / result["seconds"], 3)
    if result.get("peak_memory") is None:  # it loaded no model
        return
    measures = {key: result.get(key) for key in ("load_seconds", "peak_memory", "peak_gpu_memory")}
    runs = read_runs(folder, result["fingerprint"])
    if result["num_new"] or not runs:
        add_run(folder, result["fingerprint"], measures)
        runs.append(measures)
    found.load_seconds = round(runs[-1]["load_seconds"], 2)
    found.peak_memory_mb = round(max(own["peak_memory"] for own in runs) / 1e6, 1)
    if peaks := [own["peak_gpu_memory"] for own in runs if own["peak_gpu_memory"]]:
        found.peak_gpu_memory_mb = round(max(peaks) / 1e6, 1)


def shared_names(runs: Mapping[str, CaptionerRun], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The images that all captioners without an error have captioned, and notes on the others."""
    usable = {label: run for label, run in runs.items() if run.error is None}
    shared = [name for name in names if usable and all(name in run.captions for run in usable.values())]
    notes = []
    for label, run in usable.items():
        if missing := [name for name in names if name not in run.captions]:
            notes.append(
                f"{label} has no caption of {len(missing)} of {len(names)} images, such as {missing[0]!r}: "
                f"{run.failures.get(missing[0], 'unknown')}"
            )
    if notes:
        notes.append(f"the figures are of the {len(shared)} images that every captioner has captioned")
    return shared, notes


def diffusion_scores(
    model: str,
    images: Sequence[Path],
    captions: Mapping[str, Sequence[str]],
    settings: Mapping[str, Any],
    batch_size: int = 8,
    advance: Callable[[int], Any] = lambda images: None,
) -> dict[str, list[float]]:
    """The diffusion score of each caption of each captioner (`pipelines.DiffusionScorer`).

    Args:
        model: Folder or repo id of a VLV with its text-to-image model.
        captions: Of each captioner, one caption for each image.
        settings: `dtype` and `device`.

    Raises:
        OSError, ValueError: If the model cannot be loaded, or a score is not finite.
    """
    pipeline = load_reconstruction(model, **settings)
    scorer, size = DiffusionScorer.from_pipeline(pipeline), pipeline.default_size
    rows: list[torch.Tensor] = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        loaded = [pipeline.image_processor.load(path) for path in batch]
        pixels = resized_pixels(loaded, size)
        texts = [[own[place] for own in captions.values()] for place in range(start, start + len(batch))]
        rows += scorer.score(pixels, texts).scores
        advance(len(batch))
    columns = torch.stack(rows).T.tolist()  # (captioners, N)
    return dict(zip(captions, columns, strict=True))


def paired_differences(first: Measured, second: Measured, count: int, samples: int) -> dict[str, Any]:
    """The figures of one captioner less those of another on the same images, resampled together.

    Args:
        count: Number of images.
        samples: Resamplings for the intervals; 0 for none.
    """
    found: dict[str, Any] = {}
    for key, (label, statistic) in first.statistics.items():
        difference = partial(_difference, statistic, second.statistics[key][1])
        found[key] = corpus_figure(label, difference, count, samples)
    for key, (label, values) in first.means.items():
        pairs = zip(values, second.means[key][1], strict=True)
        found[key] = mean_figure(label, [one - other for one, other in pairs], samples)
    return found


def _difference(
    first: Callable[[torch.Tensor], float], second: Callable[[torch.Tensor], float], rows: torch.Tensor
) -> float:
    return first(rows) - second(rows)


def compare(
    runs: Mapping[str, CaptionerRun],
    names: Sequence[str],
    measure: Callable[[list[str], Mapping[str, CaptionSet]], Mapping[str, Measured]],
    config: Mapping[str, Any],
    samples: int,
    output: Path,
) -> dict[str, Any]:
    """Measures the captions of captioners and writes `results.json`, `results.md` and `captions.md` into `output`.

    Args:
        runs: By label.
        names: Of the images.
        measure: Maps the names of the images and the captions of each captioner to what is measured.
        config: The settings, for the results.
        samples: Resamplings for the intervals; 0 for none.

    Returns:
        What `results.json` holds.
    """
    shared, notes = shared_names(runs, names)
    usable = {label: run for label, run in runs.items() if run.error is None}
    notes += [f"{label}: {note}" for label, run in usable.items() for note in run.notes]
    sets = {label: CaptionSet(shared, [run.captions[name] for name in shared]) for label, run in usable.items()}
    measured = measure(shared, sets) if shared else {}
    for own in measured.values():
        notes += [note for note in own.notes if note not in notes]
    captioners = {label: run.facts() for label, run in runs.items()}
    for label, own in measured.items():
        captioners[label]["metrics"] = own.figures(len(shared), samples)
    results = {
        "captioners": captioners,
        "num_images": len(shared),
        "differences": [
            {"first": a, "second": b, "metrics": paired_differences(measured[a], measured[b], len(shared), samples)}
            for a, b in combinations(measured, 2)
        ],
        "notes": notes,
        "captions": {
            name: {label: run.captions[name] for label, run in runs.items() if name in run.captions} for name in names
        },
        "per_image": {label: per_image(own.values, shared) for label, own in measured.items()},
        "config": dict(config),
        "versions": package_versions(),
    }
    write_json(output / RESULTS_FILE, results)
    write_table(output, comparison_tables(results))
    write_table(output, captions_table(results), CAPTIONS_FILE)
    return results


def comparison_tables(results: Mapping[str, Any]) -> str:
    """The captioners, their figures, and the differences between them, as Markdown."""
    captioners = results["captioners"]
    header = ("captioner", "captions", "failed", "images/s", "loading, s", "peak memory, MB", "peak GPU memory, MB")
    keys = ("num_captioned", "num_failed", "images_per_second", "load_seconds", "peak_memory_mb", "peak_gpu_memory_mb")
    rows = [
        (_cell(label), *("" if own[key] is None else f"{own[key]:,}" for key in keys))
        for label, own in captioners.items()
    ]
    tables = [markdown_table(header, rows)]
    metrics = {label: own["metrics"] for label, own in captioners.items() if "metrics" in own}
    if metrics:
        tables.append(_figures_table(f"of {results['num_images']} images", metrics))
    differences = {f"{own['first']} less {own['second']}": own["metrics"] for own in results["differences"]}
    if differences:
        tables.append(_figures_table("paired difference", differences))
    return "\n\n".join(tables)


def captions_table(results: Mapping[str, Any]) -> str:
    """The captions of each image side by side, as Markdown."""
    labels = list(results["captioners"])
    rows = [
        (_cell(name), *(_cell(own.get(label, "")) for label in labels)) for name, own in results["captions"].items()
    ]
    return markdown_table(("image", *map(_cell, labels)), rows)


def _figures_table(title: str, columns: Mapping[str, Mapping[str, Any]]) -> str:
    labels = {key: one["label"] for figures in columns.values() for key, one in figures.items()}
    rows = [(label, *(format_figure(own.get(key)) for own in columns.values())) for key, label in labels.items()]
    return markdown_table((title, *map(_cell, columns)), rows)


def _cell(text: str) -> str:
    """A text as a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def captioner_folder(source: str, prompt: str | None) -> str:
    """The name of a captioner's folder: the same wherever it stands among others."""
    return f"captioner-{hashlib.blake2b(repr((source, prompt)).encode(), digest_size=6).hexdigest()}"


def label_captioners(sources: Sequence[str]) -> list[str]:
    """Short names of captioners: of the folder, the file, the repository or the endpoint's model.

    Where two have one name, an endpoint's host stands behind its own. If that is not enough, they have their sources.
    """
    labels = [_short_name(source) for source in sources]
    for rename in (_name_with_host, str):
        doubled = {label for label in labels if labels.count(label) > 1}
        labels = [
            rename(source) or label if label in doubled else label
            for label, source in zip(labels, sources, strict=True)
        ]
    return labels


def _short_name(source: str) -> str:
    path = Path(source)
    return urlsplit(source).fragment or (path.stem if path.is_file() else path.name) or source


def _name_with_host(source: str) -> str | None:
    """Of an endpoint; None for another source."""
    address = urlsplit(source)
    return f"{address.fragment} at {address.netloc}" if address.fragment else None
