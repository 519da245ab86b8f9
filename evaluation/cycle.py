"""The cycle: captions are turned into images by a text-to-image model, and compared with the captioned images.

The paper's Table 1 is this protocol with Stable Diffusion 3.5 Medium, 30,000 images of MS-COCO, and Inception.
"""

import hashlib
import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from vlv.files import write_atomically, write_json
from vlv.pipelines.schedulers import OWN, SCHEDULERS

from .features import FeatureExtractor, fingerprint_images
from .image_sets import (
    PAIR_METRICS,
    cached_statistics,
    compare_pairs,
    compare_sets,
    cosine_similarities,
    extract_statistics,
    pair_figures,
    require_packages,
)
from .markdown import markdown_table
from .results import package_versions

PAPER_FID = {1.0: 11.47, 2.0: 6.64, 3.0: 8.56, 4.0: 9.90}
"""FID of VLV's captions in the paper's Table 1, by guidance scale."""
STEM_BYTES = 100  # of an image's name in that of a generated image; file systems take 255 bytes
CUT_BY = "prompt cut by"  # of a generated image, in its file: what read only the beginning of its caption
RESULTS_FILE, TABLE_FILE = "results.json", "results.md"


@dataclass
class CycleConfig:
    """Turns captions into images and compares these with the captioned images. A run that was ended goes on.

    Raises:
        ValueError: If a setting is missing, or has a value that it cannot have.
    """

    captions: str = field(default="", metadata={"help": "JSON: {image: caption}, as `vlv caption` writes it"})
    images: str = field(default="", metadata={"help": "folder of the captioned images"})
    text_to_image: str = field(
        default="", metadata={"help": "folder or Hub repo id of a text-to-image model of diffusers, or of a VLV"}
    )
    output_dir: str = field(default="", metadata={"help": "folder of the generated images and the results"})
    features: str = field(default="inception", metadata={"help": "as --features of `vlv evaluate images`"})
    resize: str = field(default="pytorch-fid", metadata={"help": "as --resize of `vlv evaluate images`"})
    guidance: list[float] = field(
        default_factory=lambda: [1.0, 2.0, 3.0, 4.0], metadata={"help": "guidance scales (default: 1 2 3 4)"}
    )
    num_inference_steps: int = field(default=40, metadata={"help": "denoising steps of each image"})
    scheduler: str = field(
        default=OWN, metadata={"help": "as --scheduler of `vlv reconstruct` (default: the model's own)"}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "height and width in pixels (default: the model's)"}
    )
    seed: int = field(default=42, metadata={"help": "with the name of an image, the seed of its noise"})
    pair_metrics: list[str] = field(
        default_factory=lambda: ["cosine"], metadata={"help": f"of each image: {', '.join(PAIR_METRICS)}"}
    )
    batch_size: int = field(default=8, metadata={"help": "images in a batch"})
    dtype: str = field(default="float32", metadata={"help": "precision of the text-to-image model"})
    device: str | None = field(default=None, metadata={"help": "such as cpu or cuda"})
    bootstrap: int = field(default=100, metadata={"help": "resamplings for the 95%% intervals, 0 for none"})

    def __post_init__(self) -> None:
        for name in ("captions", "images", "text_to_image", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing")
        scales = self.guidance if isinstance(self.guidance, list) else [self.guidance]
        try:
            self.guidance = [float(scale) for scale in scales]
        except (TypeError, ValueError):
            self.guidance = []
        if not self.guidance or not all(0 <= scale < math.inf for scale in self.guidance):
            raise ValueError(f"guidance must be one or more scales of at least 0, not {scales}")
        for name in ("num_inference_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.scheduler not in SCHEDULERS:
            raise ValueError(f"scheduler is one of {', '.join(SCHEDULERS)}, not {self.scheduler!r}")
        if self.bootstrap < 0:
            raise ValueError(f"bootstrap must be at least 0, not {self.bootstrap}")
        if isinstance(self.pair_metrics, str):
            self.pair_metrics = [self.pair_metrics]
        if unknown := set(self.pair_metrics) - set(PAIR_METRICS):
            raise ValueError(f"pair_metrics are {', '.join(PAIR_METRICS)}, not {', '.join(sorted(unknown))}")


class ImageStore:
    """Generated images on disk, each in a file named by its input, caption, guidance and seed.

    Args:
        folder: Of one text-to-image model and its settings.
        config: For the seed.
    """

    def __init__(self, folder: Path, config: CycleConfig):
        self.folder, self.seed = folder, config.seed

    def path(self, name: str, caption: str, guidance: float) -> Path:
        """The file of an image."""
        digest = hashlib.blake2b(f"{name}\n{caption}".encode(), digest_size=8).hexdigest()
        stem = Path(name).stem.encode()[:STEM_BYTES].decode(errors="ignore")
        return self.folder / f"guidance-{guidance:g}" / f"{stem}-{digest}-seed-{self.seed}.png"

    def noise_seed(self, name: str) -> int:
        """The seed of an image's noise, which is the same for all guidance scales and depends on nothing else."""
        return int.from_bytes(hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=7).digest(), "big")


def generation_folder(config: CycleConfig, model_fingerprint: str) -> Path:
    """The folder of the images of one model and its settings, below `output_dir`."""
    settings: tuple[Any, ...] = (model_fingerprint, config.num_inference_steps, config.image_size, config.dtype)
    if config.scheduler != OWN:
        settings += (config.scheduler,)
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=6).hexdigest()
    return Path(config.output_dir) / f"images-{digest}"


@torch.no_grad()
def generate_missing(
    load_pipeline: Callable[[], Any],
    captions: Mapping[str, str],
    guidance: float,
    store: ImageStore,
    config: CycleConfig,
    advance: Callable[[int], Any] = lambda images: None,
) -> list[Path]:
    """Generates the images that are not on disk yet.

    Args:
        load_pipeline: Returns a text-to-image pipeline of diffusers. Called only if an image is missing.
        captions: By the name of the captioned image.
        advance: Called with the number of images after each batch.

    Returns:
        The files of all images, in the order of the captions.
    """
    files = {name: store.path(name, caption, guidance) for name, caption in captions.items()}
    missing = [name for name, file in files.items() if not file.exists()]
    advance(len(files) - len(missing))
    size = {} if config.image_size is None else {"height": config.image_size, "width": config.image_size}
    for start in range(0, len(missing), config.batch_size):
        batch = missing[start : start + config.batch_size]
        pipeline = load_pipeline()
        images = pipeline(
            [captions[name] for name in batch],
            guidance_scale=guidance,
            num_inference_steps=config.num_inference_steps,
            generator=[torch.Generator().manual_seed(store.noise_seed(name)) for name in batch],
            **size,
        ).images
        for name, image in zip(batch, images, strict=True):
            write_atomically(files[name], partial(image.save, pnginfo=_prompt_info(pipeline, captions[name])))
        advance(len(batch))
    return list(files.values())


def _prompt_info(pipeline: Any, prompt: str) -> PngInfo:
    """What a generated image's file says of its prompt."""
    info = PngInfo()
    if cut := tokenizers_that_cut(pipeline, prompt):
        info.add_text(CUT_BY, " and ".join(cut))
    return info


def tokenizers_that_cut(pipeline: Any, prompt: str) -> list[str]:
    """The tokenizers of a text-to-image pipeline that read only the beginning of a prompt, with their limits."""
    settings = inspect.signature(pipeline.__call__).parameters
    length = getattr(settings.get("max_sequence_length"), "default", None)  # of encoders other than CLIP
    found = []
    for number in ("", "_2", "_3"):
        tokenizer, encoder = (getattr(pipeline, f"{part}{number}", None) for part in ("tokenizer", "text_encoder"))
        if tokenizer is None or encoder is None:
            continue
        limit = tokenizer.model_max_length
        if isinstance(length, int) and "clip" not in encoder.config.model_type:
            limit = min(limit, length)
        if len(tokenizer(prompt, verbose=False).input_ids) > limit:
            found.append(f"tokenizer{number} ({limit} tokens)")
    return found


def cut_notes(files: Sequence[Path]) -> list[str]:
    """Notes on how many generated images are of prompts that were cut."""
    cut: Counter[str | None] = Counter()
    for file in files:
        with Image.open(file) as image:
            cut[image.info.get(CUT_BY)] += 1
    return [
        f"{which} of the text-to-image model cut {count} of {len(files)} captions: their ends are not in the images"
        for which, count in sorted((which, count) for which, count in cut.items() if which is not None)
    ]


def run_cycle(
    config: CycleConfig,
    captions: Mapping[str, str],
    originals: Sequence[Path],
    load_pipeline: Callable[[], Any],
    model_fingerprint: str,
    extractor: FeatureExtractor,
    device: str = "cpu",
    advance: Callable[[int], Any] = lambda images: None,
) -> dict[str, Any]:
    """Runs the protocol and writes `results.json` and `results.md` into `output_dir`.

    Args:
        captions: By the name of the captioned image.
        originals: The captioned images, one for each caption.
        load_pipeline: As in `generate_missing`.
        model_fingerprint: Of the text-to-image model.
        advance: Called with the number of generated images after each batch.

    Returns:
        What `results.json` holds: `metrics` by guidance, `notes`, `config` and `versions`.

    Raises:
        ImportError: If the package of a pair metric is not installed.
    """
    require_packages(config.pair_metrics)
    folder = Path(config.output_dir)
    store = ImageStore(generation_folder(config, model_fingerprint), config)
    compared = extractor.fingerprint + fingerprint_images(originals)
    digest = hashlib.blake2b(compared.encode(), digest_size=6).hexdigest()
    reference = cached_statistics(originals, extractor, folder / f"reference-{digest}.safetensors")
    results: dict[str, Any] = {
        "metrics": {},
        "notes": [],
        "features": extractor.name,
        "num_images": len(captions),
        "config": asdict(config),
        "text_to_image_fingerprint": model_fingerprint,
        "versions": package_versions(),
    }
    for guidance in config.guidance:
        files = generate_missing(load_pipeline, captions, guidance, store, config, advance)
        generated = extract_statistics(files, extractor)
        figures, notes = compare_sets(generated, reference, extractor, config.bootstrap, paired=True)
        values = {}
        if "cosine" in config.pair_metrics:
            values["cosine"] = cosine_similarities(generated.features, reference.features)
        others = [name for name in config.pair_metrics if name != "cosine"]
        if others:
            values |= compare_pairs(zip(files, originals, strict=True), others, device)
        pairs, more = pair_figures(values, config.bootstrap)
        results["metrics"][f"{guidance:g}"] = figures | pairs
        results["notes"] = list(dict.fromkeys([*results["notes"], *notes, *more, *cut_notes(files)]))
        write_json(folder / RESULTS_FILE, results)
    write_atomically(folder / TABLE_FILE, lambda path: path.write_text(cycle_table(results) + "\n", encoding="utf-8"))
    return results


def cycle_table(results: Mapping[str, Any]) -> str:
    """The figures by guidance as a Markdown table; with Inception's features the paper's FID of VLV is beside them."""
    by_guidance = results["metrics"]
    labels = {key: one["label"] for figures in by_guidance.values() for key, one in figures.items()}
    rows = []
    for key, label in labels.items():
        rows.append((label, *(_cell(figures.get(key)) for figures in by_guidance.values())))
        if label == "FID":
            rows.append(("FID of VLV in the paper", *(str(PAPER_FID.get(float(g), "")) for g in by_guidance)))
    return markdown_table(("metric", *(f"guidance {guidance}" for guidance in by_guidance)), rows)


def _cell(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return ""
    ends = one.get("interval")
    return f"{one['value']:.4g}" + (f" ({ends[0]:.4g} to {ends[1]:.4g})" if ends else "")
