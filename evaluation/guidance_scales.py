"""Generated images against their originals, over guidance scales: figures, files and their table."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlv.files import write_json

from .features import FeatureExtractor, fingerprint_images
from .generated_images import (
    PARTIAL_FILE,
    GenerationConfig,
    ImageSource,
    cut_notes,
    generate_missing,
    relative_files,
    write_results,
)
from .image_sets import (
    FEATURE_METRICS,
    PAIR_METRICS,
    cached_statistics,
    compare_pairs,
    compare_sets,
    cosine_similarities,
    extract_statistics,
    pair_figures,
    require_pair_metrics,
    scene_figures,
)
from .markdown import markdown_table
from .published import published_figures, published_notes
from .results import format_figure, package_versions, per_image, write_table
from .statistics import FeatureStatistics


@dataclass
class ComparisonConfig(GenerationConfig):
    """Settings of a protocol that compares generated images with their originals."""

    features: list[str] = field(
        default_factory=lambda: ["inception"],
        metadata={
            "help": "one or more, each as --features of `vlv evaluate images`: inception for FID, CLIP for CMMD"
        },
    )
    resize: str = field(default="pytorch-fid", metadata={"help": "as --resize of `vlv evaluate images`"})
    paper: str | None = field(
        default=None,
        metadata={"help": "row of the paper's tables beside the figures, such as table1/vlv (default: none)"},
    )
    pair_metrics: list[str] = field(
        default_factory=lambda: ["cosine"], metadata={"help": f"of each image: {', '.join(PAIR_METRICS)}"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("features", "pair_metrics"):
            if isinstance(value := getattr(self, name), str):
                setattr(self, name, [value])
        if not self.features or len(set(self.features)) < len(self.features):
            raise ValueError(f"features must be one or more different ones, not {self.features}")
        if unknown := set(self.pair_metrics) - set(PAIR_METRICS):
            raise ValueError(f"pair_metrics are {', '.join(PAIR_METRICS)}, not {', '.join(sorted(unknown))}")


def compare_over_guidance(
    config: ComparisonConfig,
    source: ImageSource,
    originals: Sequence[Path],
    extractors: Sequence[FeatureExtractor],
    facts: Mapping[str, Any],
    device: str = "cpu",
    advance: Callable[[int], Any] = lambda images: None,
) -> dict[str, Any]:
    """Generates the images of each guidance scale, measures them, and writes `results.json` and `results.md`.

    Args:
        originals: One for each name of the source, in the same order.
        extractors: Of the features that are compared. Keys of the second one's figures end in `_2`, and so on.
        facts: What the results say besides. Its `notes` come first.
        advance: Called with the number of generated images after each batch.

    Returns:
        What `results.json` holds: `metrics` by guidance, `per_image` and `files` (the generated images, relative to
        `output_dir`) by guidance, `notes`, `config`, `versions` and the facts.

    Raises:
        ImportError: If the package of a pair metric is not installed.
        ValueError: If an image cannot be read, or no extractor computes a pair metric.
    """
    require_pair_metrics(config.pair_metrics, extractors)
    folder = Path(config.output_dir)
    images = fingerprint_images(originals)
    references = []
    for extractor in extractors:
        digest = hashlib.blake2b((extractor.fingerprint + images).encode(), digest_size=6).hexdigest()
        references.append(cached_statistics(originals, extractor, folder / f"reference-{digest}.safetensors"))
    results: dict[str, Any] = {
        "metrics": {},
        "notes": [],
        "per_image": {},
        "files": {},
        "features": "; ".join(extractor.name for extractor in extractors),
        "num_images": len(originals),
        "config": asdict(config),
        "model_fingerprint": source.fingerprint,
        "versions": package_versions(),
        **facts,
    }
    for guidance in config.guidance:
        files = generate_missing(source, guidance, config, advance)
        figures: dict[str, Any] = {}
        notes: list[str] = []
        each: dict[str, Sequence[float]] = {}
        scenes: dict[str, Any] = {}
        for number, (extractor, reference) in enumerate(zip(extractors, references, strict=True), 1):
            found, more, cosines = _compare_features(config, files, extractor, reference)
            each |= {key if number == 1 else f"{key}_{number}": values for key, values in cosines.items()}
            if len(extractors) > 1:
                found = {key: one | {"label": _label(one["label"], extractor)} for key, one in found.items()}
            figures |= {key if number == 1 else f"{key}_{number}": one for key, one in found.items()}
            notes += more
            if "scenes" in config.pair_metrics:
                found, values = scene_figures(extractor, files, originals, config.bootstrap)
                scenes |= found
                each |= values
        figures |= scenes
        others = [name for name in config.pair_metrics if name not in FEATURE_METRICS]
        if others:
            similarities = compare_pairs(zip(files, originals, strict=True), others, device)
            pairs, more = pair_figures(similarities, config.bootstrap)
            figures |= pairs
            notes += more
            each |= similarities
        results["metrics"][f"{guidance:g}"] = figures
        results["per_image"][f"{guidance:g}"] = per_image(each, source.names)
        results["files"][f"{guidance:g}"] = relative_files(source.names, files, folder)
        labels = [one["label"] for one in figures.values()]
        notes += [*cut_notes(files), *published_notes(results["config"], len(originals), labels)]
        results["notes"] = list(dict.fromkeys([*results["notes"], *notes]))
        write_json(folder / PARTIAL_FILE, results)
    write_results(folder, results)
    write_table(folder, guidance_table(results))
    return results


def _compare_features(
    config: ComparisonConfig, files: Sequence[Path], extractor: FeatureExtractor, reference: FeatureStatistics
) -> tuple[dict[str, Any], list[str], dict[str, list[float]]]:
    """Figures of one extractor's features of the generated images against those of the originals, notes, and the
    figures of each image.
    """
    generated = extract_statistics(files, extractor)
    figures, notes = compare_sets(generated, reference, extractor, config.bootstrap, paired=True)
    each: dict[str, list[float]] = {}
    if "cosine" in config.pair_metrics:
        each["cosine"] = cosine_similarities(generated.features, reference.features)
        pairs, more = pair_figures(each, config.bootstrap)
        figures, notes = figures | pairs, notes + more
    return figures, notes, each


def _label(label: str, extractor: FeatureExtractor) -> str:
    """The label of a figure beside those of other features. FID, KID and CMMD name theirs."""
    return label if label in ("FID", "KID", "CMMD") else f"{label} ({extractor.name})"


def guidance_table(results: Mapping[str, Any]) -> str:
    """The figures by guidance as a Markdown table, each followed by that of the paper's row, if `paper` names one."""
    by_guidance = results["metrics"]
    labels = {key: one["label"] for figures in by_guidance.values() for key, one in figures.items()}
    rows = []
    for key, label in labels.items():
        rows.append((label, *(format_figure(figures.get(key)) for figures in by_guidance.values())))
        if published := published_figures(results["config"].get("paper"), label, list(by_guidance)):
            rows.append((published[0], *published[1]))
    return markdown_table(("metric", *(f"guidance {guidance}" for guidance in by_guidance)), rows)
