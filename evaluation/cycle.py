"""The cycle: captions are turned into images by a text-to-image model, and compared with the captioned images.

The paper's Table 1 is this protocol with Stable Diffusion 3.5 Medium, 30,000 images of MS-COCO, and Inception.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from vlv.files import write_json

from .caption_sets import entries_of, read_captions
from .captioners import (
    KINDS,
    Captioner,
    ImageCaption,
    caption_images,
    caption_notes,
    endpoint_settings,
    open_captioner,
)
from .endpoint import EndpointOptions
from .features import FeatureExtractor
from .generated_images import CaptionSource
from .guidance_scales import ComparisonConfig, compare_over_guidance
from .published import require_row

NAMES_IN_NOTES = 3
CAPTIONS_FILE, CAPTIONS_LOG, ANSWERS_LOG = "captions.json", "captions.jsonl", "answers.jsonl"


@dataclass
class CycleConfig(EndpointOptions, ComparisonConfig):
    """Turns captions into images and compares these with the captioned images (the paper's Table 1).

    The captions are those of a file, or a captioner writes them. A run that was ended goes on.
    """

    REQUIRED: ClassVar[tuple[str, ...]] = ("images", "text_to_image", "output_dir")

    text_to_image: str = field(
        default="", metadata={"help": "folder or Hub repo id of a text-to-image model of diffusers, or of a VLV"}
    )
    captions: str | None = field(
        default=None, metadata={"help": "JSON: {image: caption}, as `vlv caption` writes it; or set captioner"}
    )
    captioner: str | None = field(
        default=None,
        metadata={
            "help": "what captions the images: folder or Hub repo id of a VLV or of a model that transformers' "
            "pipeline image-text-to-text loads, or https://host/v1#model, a model behind an OpenAI-compatible endpoint"
        },
    )
    captioner_kind: str | None = field(
        default=None, metadata={"help": f"{', '.join(KINDS)} (default: found from captioner)"}
    )
    prompt: str | None = field(default=None, metadata={"help": "what the captioner is asked"})
    max_new_tokens: int = field(default=300, metadata={"help": "most tokens of a caption by captioner"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_row(self.paper, "cycle")
        if bool(self.captions) == bool(self.captioner):
            raise ValueError("set captions, a file, or captioner, what writes them, and not both")
        if self.captioner_kind not in (None, *KINDS):
            raise ValueError(f"captioner_kind is one of {', '.join(KINDS)}, not {self.captioner_kind!r}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.captioner and (self.captioner_kind or "endpoint") == "endpoint" and "://" in self.captioner:
            endpoint_settings(self.captioner, max_tokens=self.max_new_tokens, **self.options())  # checks them


@dataclass(frozen=True)
class CycleInputs:
    """What is captioned.

    Attributes:
        images: Files by name.
        captions: Of the images, by name; None if a captioner writes them.
    """

    images: Mapping[str, Path]
    captions: Mapping[str, str] | None


def read_inputs(config: CycleConfig, images: Mapping[str, Path]) -> CycleInputs:
    """The images and captions of a run, of which a file of captions decides which images are taken.

    Args:
        images: Files of the folder by name.

    Raises:
        ValueError: If the file of captions is another one, or an image is missing.
    """
    if config.captions is None:
        return CycleInputs(dict(list(images.items())[: config.limit]), None)
    captions = dict(list(read_captions(config.captions).items())[: config.limit])
    if not captions:
        raise ValueError(f"{config.captions} has no captions")
    paths = entries_of(list(captions), images, f"images {config.images}")
    return CycleInputs(dict(zip(captions, paths, strict=True)), captions)


def plan_cycle(config: CycleConfig, inputs: CycleInputs) -> str:
    """What a run would do."""
    count = len(inputs.images)
    if inputs.captions is None:
        asked = "" if config.prompt is None else f", asked {config.prompt!r}"
        captions = f"{count} captions by {config.captioner}{asked}, of at most {config.max_new_tokens} tokens"
    else:
        captions = f"{count} captions of {config.captions}, such as {next(iter(inputs.captions.values()))!r:.80}"
    return f"{captions}\n{config.describe(count, config.text_to_image)}"


def open_config_captioner(config: CycleConfig, source: str, device: str) -> Captioner:
    """The captioner of a run; `source` is `config.captioner`, or the folder that it stands for.

    Raises:
        As `open_captioner`.
    """
    return open_captioner(
        source,
        kind=config.captioner_kind,
        prompt=config.prompt,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        dtype=getattr(torch, config.dtype),
        device=device,
        log=Path(config.output_dir) / ANSWERS_LOG,
        endpoint=config.options(),
    )


def write_captions(
    config: CycleConfig,
    captioner: Captioner,
    images: Mapping[str, Path],
    advance: Callable[[int], Any] = lambda images: None,
) -> tuple[dict[str, str], dict[str, Any]]:
    """Captions of the images, kept in `output_dir`, and facts about them for the results.

    Images that could not be captioned are left out, and a note of the facts names them.

    Args:
        advance: Called with 1 after each image.

    Raises:
        ValueError: If there is no caption at all.
        EndpointError, PriceReached: As `endpoint.Endpoint.ask`.
    """
    folder = Path(config.output_dir)
    found = caption_images(captioner, images, folder / CAPTIONS_LOG, advance)
    captions = {own.name: own.caption for own in found if own.caption is not None}
    failed = {own.name: own.error for own in found if own.error is not None}
    if not captions:
        raise ValueError(f"{captioner.source} captioned no image; the first reason: {next(iter(failed.values()))}")
    write_json(folder / CAPTIONS_FILE, captions)
    facts: dict[str, Any] = {
        "captioner": {
            "source": captioner.source,
            "kind": captioner.kind,
            "fingerprint": captioner.fingerprint,
            "seconds": round(sum(own.seconds for own in found), 3),
            "failed": failed,
        },
        **caption_facts(found),
    }
    if failed:
        shown = "; ".join(f"{name}: {error}" for name, error in list(failed.items())[:NAMES_IN_NOTES])
        facts["notes"].insert(0, f"{len(failed)} of {len(found)} images have no caption and are left out: {shown}")
    return captions, facts


def caption_facts(found: Sequence[ImageCaption]) -> dict[str, Any]:
    """Which captions are empty and which are cut off, by the name of the image, and `notes` on their number."""
    return {
        "empty_captions": [own.name for own in found if own.is_empty],
        "cut_captions": [own.name for own in found if own.is_cut],
        "notes": caption_notes(found),
    }


def run_cycle(
    config: CycleConfig,
    captions: Mapping[str, str],
    images: Mapping[str, Path],
    load_pipeline: Callable[[], Any],
    model_fingerprint: str,
    extractors: Sequence[FeatureExtractor],
    facts: Mapping[str, Any] | None = None,
    device: str = "cpu",
    advance: Callable[[int], Any] = lambda images: None,
) -> dict[str, Any]:
    """Runs the protocol and writes `results.json` and `results.md` into `output_dir`.

    Args:
        captions: By the name of the captioned image.
        images: The captioned images by name.
        load_pipeline: Returns a text-to-image pipeline of diffusers. Called only if an image is missing.
        model_fingerprint: Of the text-to-image model.
        facts: What the results say besides, as `write_captions` returns it; by default the `caption_facts` of
            `captions`.
        advance: Called with the number of generated images after each batch.

    Returns, raises: As `compare_over_guidance`.
    """
    source = CaptionSource(captions, load_pipeline, model_fingerprint)
    originals = [images[name] for name in captions]
    if facts is None:
        facts = caption_facts([ImageCaption(name, caption) for name, caption in captions.items()])
    return compare_over_guidance(config, source, originals, extractors, facts, device=device, advance=advance)
