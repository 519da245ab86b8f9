"""Images that a protocol generates from captions or caption embeddings: settings, files, and what is not there yet."""

import hashlib
import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from vlv.files import write_atomically, write_json
from vlv.pipelines import generate_images
from vlv.pipelines.schedulers import OWN, SCHEDULERS
from vlv.processing_vlv import to_rgb

from .features import file_digest
from .results import RESULTS_FILE

STEM_BYTES = 100  # of an image's name in that of a generated image; file systems take 255 bytes
CUT_BY = "prompt cut by"  # of a generated image, in its file: what read only the beginning of its caption
DTYPES = ("float32", "bfloat16", "float16")
NOISE = ("name", "position")
PARTIAL_FILE = "results-partial.json"  # of a run that has not ended, so that complete results stay as they are


@dataclass
class GenerationConfig:
    """Settings of a protocol that generates images. A run that was ended goes on.

    Raises:
        ValueError: If a setting is missing, or has a value that it cannot have.
    """

    REQUIRED: ClassVar[tuple[str, ...]] = ("images", "output_dir")

    images: str = field(default="", metadata={"help": "folder of the original images"})
    output_dir: str = field(default="", metadata={"help": "folder of the generated images and the results"})
    guidance: list[float] = field(default_factory=lambda: [1.0, 2.0, 3.0, 4.0], metadata={"help": "guidance scales"})
    num_inference_steps: int = field(default=40, metadata={"help": "denoising steps of each image"})
    scheduler: str = field(
        default=OWN, metadata={"help": "as --scheduler of `vlv reconstruct` (default: the model's own)"}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "height and width in pixels (default: the model's)"}
    )
    seed: int = field(default=42, metadata={"help": "of the noise, see noise"})
    noise: str = field(
        default="name",
        metadata={
            "help": "what the noise of an image depends on: name (seed and the image's name) or position (seed plus "
            "its position, from 0), as in `vlv evaluate miniature`"
        },
    )
    batch_size: int = field(default=8, metadata={"help": "images in a batch"})
    dtype: str = field(default="float32", metadata={"help": f"precision of the model: {', '.join(DTYPES)}"})
    device: str | None = field(default=None, metadata={"help": "such as cpu or cuda"})
    bootstrap: int = field(default=100, metadata={"help": "resamplings for the 95%% intervals, 0 for none"})
    limit: int | None = field(default=None, metadata={"help": "images to take, from the beginning (default: all)"})
    dry_run: bool = field(
        default=False, metadata={"help": "read the names and captions, print the plan, load no model"}
    )

    def __post_init__(self) -> None:
        for name in self.REQUIRED:
            if not getattr(self, name):
                raise ValueError(f"{name} is missing: {self.__dataclass_fields__[name].metadata['help']}")
        scales = self.guidance if isinstance(self.guidance, list) else [self.guidance]
        try:
            self.guidance = [float(scale) for scale in scales]
        except (TypeError, ValueError):
            self.guidance = []
        if not self.guidance or not all(0 <= scale < math.inf for scale in self.guidance):
            raise ValueError(f"guidance must be one or more scales of at least 0, not {scales}")
        for name in ("num_inference_steps", "batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.noise not in NOISE:
            raise ValueError(f"noise is one of {', '.join(NOISE)}, not {self.noise!r}")
        if self.scheduler not in SCHEDULERS:
            raise ValueError(f"scheduler is one of {', '.join(SCHEDULERS)}, not {self.scheduler!r}")
        if self.bootstrap < 0:
            raise ValueError(f"bootstrap must be at least 0, not {self.bootstrap}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is one of {', '.join(DTYPES)}, not {self.dtype!r}")

    def describe(self, count: int, model: str) -> str:
        """The plan of `count` images for each guidance scale, for a dry run."""
        scales = ", ".join(f"{scale:g}" for scale in self.guidance)
        size = "the model's size" if self.image_size is None else f"{self.image_size} pixels"
        return (
            f"{count * len(self.guidance)} images by {model}, of {size}, with {self.num_inference_steps} steps: "
            f"{count} with guidance {scales}, in batches of {self.batch_size}, in {self.dtype}; results in "
            f"{self.output_dir}"
        )


class ImageSource(Protocol):
    """What images are generated from, by name.

    Attributes:
        names: Of the images.
        fingerprint: Of the model that generates them.
    """

    names: list[str]
    fingerprint: str

    def identity(self, name: str) -> str:
        """Differs if the image of a name is generated from something else."""

    def generate(self, names: Sequence[str], seeds: Sequence[int], **settings: Any) -> list[Image.Image]:
        """One batch: an image for each name, with noise of its seed.

        Args:
            settings: `guidance_scale`, `num_inference_steps`, and `height` and `width` if they are not the model's.
        """

    def file_info(self, name: str) -> PngInfo | None:
        """What the file of a generated image says beside the pixels. Called after `generate`."""


class CaptionSource:
    """Captions, by the name of the captioned image, and a text-to-image pipeline of diffusers.

    Args:
        load_pipeline: Returns the pipeline. Called only if an image is missing.
    """

    def __init__(self, captions: Mapping[str, str], load_pipeline: Callable[[], Any], fingerprint: str):
        self.captions, self.load_pipeline, self.fingerprint = captions, load_pipeline, fingerprint
        self.names = list(captions)

    def identity(self, name: str) -> str:
        return self.captions[name]

    @torch.no_grad()
    def generate(self, names: Sequence[str], seeds: Sequence[int], **settings: Any) -> list[Image.Image]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        pipeline = self.load_pipeline()
        return pipeline([self.captions[name] for name in names], generator=generators, **settings).images

    def file_info(self, name: str) -> PngInfo:
        info = PngInfo()
        if cut := tokenizers_that_cut(self.load_pipeline(), self.captions[name]):
            info.add_text(CUT_BY, " and ".join(cut))
        return info


class EmbeddingSource:
    """The caption embeddings of images, and the reconstruction pipeline of a VLV.

    Args:
        images: Files by name.
        load_pipeline: Returns the pipeline. Called only if an image is missing.
    """

    def __init__(self, images: Mapping[str, Path], load_pipeline: Callable[[], Any], fingerprint: str):
        self.images, self.load_pipeline, self.fingerprint = images, load_pipeline, fingerprint
        self.names = list(images)

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {name: file_digest(path) for name, path in self.images.items()}

    def identity(self, name: str) -> str:
        return self._digests[name]

    @torch.no_grad()
    def generate(self, names: Sequence[str], seeds: Sequence[int], **settings: Any) -> list[Image.Image]:
        pictures = [to_rgb(str(self.images[name])) for name in names]
        return to_pil_images(generate_images(self.load_pipeline(), image=pictures, seeds=seeds, **settings))

    def file_info(self, name: str) -> None:
        return None


class ImageStore:
    """Generated images on disk, each in a file named by its input, its source, guidance and seed.

    Args:
        folder: Of one model and its settings.
        config: For the seed, and what the noise depends on.
        names: Of all images, in their order, for noise by position.
    """

    def __init__(self, folder: Path, config: GenerationConfig, names: Sequence[str] = ()):
        self.folder, self.seed = folder, config.seed
        self._positions = {name: place for place, name in enumerate(names)} if config.noise == "position" else None

    def path(self, name: str, identity: str, guidance: float) -> Path:
        """The file of an image. `identity` is that of an `ImageSource`, such as the caption."""
        digest = hashlib.blake2b(f"{name}\n{identity}".encode(), digest_size=8).hexdigest()
        stem = Path(name).stem.encode()[:STEM_BYTES].decode(errors="ignore")
        noise = f"seed-{self.seed}" if self._positions is None else f"noise-{self.noise_seed(name)}"
        return self.folder / f"guidance-{guidance:g}" / f"{stem}-{digest}-{noise}.png"

    def noise_seed(self, name: str) -> int:
        """The seed of an image's noise, which is the same for all guidance scales and depends on nothing else."""
        if self._positions is not None:
            return self.seed + self._positions[name]
        return int.from_bytes(hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=7).digest(), "big")


def image_store(config: GenerationConfig, model_fingerprint: str, names: Sequence[str] = ()) -> ImageStore:
    """The store of one model and its settings, in a folder below `output_dir`."""
    settings: tuple[Any, ...] = (model_fingerprint, config.num_inference_steps, config.image_size, config.dtype)
    if config.scheduler != OWN:
        settings += (config.scheduler,)
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=6).hexdigest()
    return ImageStore(Path(config.output_dir) / f"images-{digest}", config, names)


def generate_missing(
    source: ImageSource,
    guidance: float,
    config: GenerationConfig,
    advance: Callable[[int], Any] = lambda images: None,
) -> list[Path]:
    """Generates the images that are not on disk yet.

    Args:
        advance: Called with the number of images after each batch.

    Returns:
        The files of all images, in the order of the source's names.
    """
    store = image_store(config, source.fingerprint, source.names)
    files = {name: store.path(name, source.identity(name), guidance) for name in source.names}
    missing = [name for name, file in files.items() if not file.exists()]
    advance(len(files) - len(missing))
    settings: dict[str, Any] = {"guidance_scale": guidance, "num_inference_steps": config.num_inference_steps}
    if config.image_size is not None:
        settings |= {"height": config.image_size, "width": config.image_size}
    for start in range(0, len(missing), config.batch_size):
        batch = missing[start : start + config.batch_size]
        images = source.generate(batch, [store.noise_seed(name) for name in batch], **settings)
        for name, image in zip(batch, images, strict=True):
            write_atomically(files[name], partial(image.save, pnginfo=source.file_info(name)))
        advance(len(batch))
    return list(files.values())


def relative_files(names: Sequence[str], files: Sequence[Path], folder: Path) -> dict[str, str]:
    """The generated images by name, relative to a folder, as `files` of the results has them."""
    return {name: file.relative_to(folder).as_posix() for name, file in zip(names, files, strict=True)}


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Writes the results of a complete run and removes those that were written on the way."""
    write_json(folder / RESULTS_FILE, results)
    (folder / PARTIAL_FILE).unlink(missing_ok=True)


def to_pil_images(images: torch.Tensor) -> list[Image.Image]:
    """Images `(B, 3, H, W)` in 0..1 as PIL images."""
    pixels = (images.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
    return [Image.fromarray(image) for image in pixels]


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
