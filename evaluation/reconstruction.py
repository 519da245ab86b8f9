"""Reconstruction: images are generated from the caption embeddings of images, and compared with these.

The paper's Table 5 (left) is this protocol with 30,000 images of MS-COCO 2014 val, Table 4 (left) with another set.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from .features import FeatureExtractor
from .generated_images import EmbeddingSource
from .guidance_scales import ComparisonConfig, compare_over_guidance, guidance_table

PAPER_FID = {1.0: 9.71, 2.0: 7.22, 3.0: 7.70, 4.0: 7.84}
"""FID of reconstructions in the paper's Table 5 (40 million images), by guidance scale."""


@dataclass
class ReconstructionConfig(ComparisonConfig):
    """Generates images from the caption embeddings of images and compares them with these (the paper's Table 5)."""

    REQUIRED: ClassVar[tuple[str, ...]] = ("images", "model", "output_dir")

    model: str = field(default="", metadata={"help": "folder or Hub repo id of a VLV; miniature is the embedded one"})
    num_inference_steps: int = field(default=50, metadata={"help": "denoising steps of each image"})


def plan_reconstruction(config: ReconstructionConfig, images: Mapping[str, Path]) -> str:
    """What a run would do."""
    return config.describe(len(images), config.model)


def run_reconstruction(
    config: ReconstructionConfig,
    images: Mapping[str, Path],
    load_pipeline: Callable[[], Any],
    fingerprint: str,
    extractors: Sequence[FeatureExtractor],
    device: str = "cpu",
    advance: Callable[[int], Any] = lambda images: None,
) -> dict[str, Any]:
    """Runs the protocol and writes `results.json` and `results.md` into `output_dir`.

    Args:
        images: Files by name.
        load_pipeline: Returns the reconstruction pipeline. Called only if an image is missing.
        fingerprint: Of the model.
        advance: Called with the number of generated images after each batch.

    Returns, raises: As `compare_over_guidance`.
    """
    source = EmbeddingSource(images, load_pipeline, fingerprint)
    originals = list(images.values())
    return compare_over_guidance(
        config, source, originals, extractors, reconstruction_table, {}, device=device, advance=advance
    )


def reconstruction_table(results: Mapping[str, Any]) -> str:
    """The figures by guidance as a Markdown table; with Inception's features the paper's FID is beside them."""
    return guidance_table(results, {"FID": PAPER_FID})
