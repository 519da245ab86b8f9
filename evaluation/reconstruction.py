"""Reconstruction: images are generated from the caption embeddings of images, and compared with these.

The paper's Table 5 (left) is this protocol with 30,000 images of MS-COCO 2014 val, Table 4 (left) with another set.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from .features import FeatureExtractor
from .generated_images import EmbeddingSource
from .guidance_scales import ComparisonConfig, compare_over_guidance
from .published import require_row


@dataclass
class ReconstructionConfig(ComparisonConfig):
    """Generates images from the caption embeddings of images and compares them with these (the paper's Table 5)."""

    REQUIRED: ClassVar[tuple[str, ...]] = ("images", "model", "output_dir")

    model: str = field(default="", metadata={"help": "folder or Hub repo id of a VLV; miniature is the embedded one"})
    num_inference_steps: int = field(default=50, metadata={"help": "denoising steps of each image"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_row(self.paper, "reconstruction")


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
    return compare_over_guidance(config, source, originals, extractors, {}, device=device, advance=advance)
