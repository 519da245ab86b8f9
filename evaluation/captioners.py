"""Captions of images by any captioner: a VLV, a model of transformers, an endpoint, or a file of captions."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch
from transformers import PreTrainedConfig

from vlv import VLVConfig, hub
from vlv.pipelines import generate_captions
from vlv.processing_vlv import to_rgb

from .answer_log import end_last_line
from .caption_sets import read_captions
from .endpoint import Endpoint, EndpointSettings, Question, image_part
from .features import file_digest
from .matching import match_names

KINDS = ("vlv", "pipeline", "endpoint", "file")
PROMPT = "Describe this image in detail."
"""What chat models are asked where no prompt is given. A VLV needs none."""
CAPTION_TASK = "<MORE_DETAILED_CAPTION>"
"""What Florence-2 is asked where no prompt is given, which reads the names of its tasks."""
QUESTIONS_PER_ROUND = 8  # for each request at once: so many captions of an endpoint are awaited together


@dataclass(frozen=True)
class ImageCaption:
    """What a captioner says of one image. Either `caption` or `error` is None.

    Attributes:
        name: Of the image.
        caption: May be empty, if the captioner says nothing of the image.
        seconds: What the caption took: the share of its batch, or the time of its request.
        is_cut: Whether an endpoint says that it ended the caption at the most tokens. False of other captioners, which
            do not say so.
    """

    name: str
    caption: str | None
    error: str | None = None
    seconds: float = 0.0
    is_cut: bool = False

    @property
    def is_empty(self) -> bool:
        return self.caption is not None and not self.caption.strip()


class Captioner(Protocol):
    """Writes captions of images.

    Attributes:
        source: What it was opened from.
        kind: One of `KINDS`.
        fingerprint: Differs if its captions may differ.
        keeps_captions: Whether it has the captions of an earlier run on disk, so that none has to be kept elsewhere.
    """

    source: str
    kind: str
    fingerprint: str
    keeps_captions: bool

    def caption(self, paths: Sequence[Path], names: Sequence[str] | None = None) -> Iterator[ImageCaption]:
        """The caption of each image file, in their order. An image that cannot be read or captioned has an `error`.

        Args:
            names: Of the images, each different; by default the names of the files. The image of a file of captions
                is found by them.
        """


def open_captioner(
    source: str,
    *,
    kind: str | None = None,
    prompt: str | None = None,
    max_new_tokens: int = 300,
    batch_size: int = 8,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    revision: str | None = None,
    log: Path | None = None,
    endpoint: Mapping[str, Any] | None = None,
) -> Captioner:
    """Opens a captioner. No code of a repository runs.

    Args:
        source: Folder or repo id of a VLV, or of a model that `pipeline("image-text-to-text")` of transformers loads;
            the address of an OpenAI-compatible endpoint with the model's name, `https://host/v1#model`; or a JSON file
            `{image: caption}`.
        kind: One of `KINDS`; by default found from the source.
        prompt: What the captioner is asked; by default `default_prompt`, and `PROMPT` for an endpoint. A VLV takes an
            instruction that it was trained to follow, or the beginning of the caption; a model without a chat template
            reads the text as its processor does.
        max_new_tokens: Most tokens of a caption. Captions are greedy.
        batch_size: Images of a VLV in a batch. Models of transformers take one image after the other.
        dtype, device, revision: Of a VLV and a model of transformers.
        log: Where an endpoint's answers are kept (`endpoint.Endpoint`); it needs one.
        endpoint: Further settings of `endpoint.EndpointSettings`.

    Raises:
        FileNotFoundError, OSError: If there is no such model or file.
        ValueError: If it cannot caption, or a file is damaged.
        ImportError, EndpointError: As `endpoint.Endpoint`.
    """
    kind = kind or find_kind(source, revision)
    loaded: dict[str, Any] = {"dtype": dtype, "device": device, "revision": revision}
    if kind == "vlv":
        return VLVCaptioner(source, prompt, max_new_tokens, batch_size, **loaded)
    if kind == "pipeline":
        return PipelineCaptioner(source, prompt, max_new_tokens, **loaded)
    if kind == "endpoint":
        if log is None:
            raise ValueError(f"{source} is an endpoint; pass log, the file that keeps its answers")
        settings = endpoint_settings(source, max_tokens=max_new_tokens, **(endpoint or {}))
        return EndpointCaptioner(source, settings, prompt, log)
    if kind == "file":
        return FileCaptioner(source)
    raise ValueError(f"kind is one of {', '.join(KINDS)}, not {kind!r}")


def find_kind(source: str, revision: str | None = None) -> str:
    """The kind of a captioner.

    Raises:
        FileNotFoundError: For a path that does not exist.
        OSError: If it is none of them.
    """
    if source.startswith(("http://", "https://")):
        return "endpoint"
    if Path(source).is_file() or (source.endswith(".json") and not Path(source).is_dir()):
        return "file"
    if not Path(source).exists() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise FileNotFoundError(f"{source} does not exist; expected a folder with a model, or a repo id like org/name")
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise FileNotFoundError(f"{source} is not the folder of a model: it has no config.json")
    try:
        config, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    except (OSError, ValueError) as error:
        if Path(source).is_dir():
            raise
        raise FileNotFoundError(
            f"{source} is neither a folder nor a model on the Hub that can be loaded; pass the folder of a model, a "
            "repo id like org/name (a private one after `hf auth login`), a JSON file of captions, or "
            f"https://host/v1#model: {first_line(error)}"
        ) from error
    return "vlv" if config.get("model_type") == VLVConfig.model_type else "pipeline"


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def endpoint_settings(source: str, **settings: Any) -> EndpointSettings:
    """The settings of the endpoint at `https://host/v1#model`.

    Raises:
        ValueError: If the source has another form.
    """
    address, _, model = source.partition("#")
    found = EndpointSettings(model, address, **settings)
    if not address or not model:
        raise ValueError(
            f"{source} names no model; expected the endpoint's address and its name of the model, "
            "such as http://127.0.0.1:8000/v1#vlv"
        )
    return found


class VLVCaptioner:
    """A VLV with its language model. See `open_captioner`."""

    kind, keeps_captions = "vlv", False

    def __init__(
        self,
        source: str,
        prompt: str | None = None,
        max_new_tokens: int = 300,
        batch_size: int = 8,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        revision: str | None = None,
    ):
        folder = hub.resolve(source, revision=revision, allow_patterns=hub.CAPTIONER_FILES)
        self.source, self.prompt, self.max_new_tokens, self.batch_size = source, prompt, max_new_tokens, batch_size
        self.model, self.processor = hub.load_captioner(folder, dtype=dtype, device=device)
        weights = hub.fingerprint(folder, hub.CAPTIONER_FINGERPRINT)
        self.fingerprint = _digest(self.kind, weights, prompt, max_new_tokens, dtype)

    def caption(self, paths: Sequence[Path], names: Sequence[str] | None = None) -> Iterator[ImageCaption]:
        names = _names(paths, names)
        for start in range(0, len(paths), self.batch_size):
            began = perf_counter()
            batch = names[start : start + self.batch_size]
            images, errors = _read_images(dict(zip(batch, paths[start : start + self.batch_size], strict=True)))
            captions: list[str] = []
            if images:
                pixel_values = self.processor.image_processor(list(images.values()), return_tensors="pt").pixel_values
                captions = generate_captions(
                    self.model,
                    self.processor,
                    pixel_values=pixel_values,
                    text=self.prompt,
                    max_new_tokens=self.max_new_tokens,
                )
            found = dict(zip(images, captions, strict=True))
            seconds = (perf_counter() - began) / len(batch)
            for name in batch:
                yield ImageCaption(name, found.get(name), errors.get(name), seconds)


def default_prompt(processor: Any) -> str:
    """What a model of transformers with this processor is asked where no prompt is given; "" for nothing."""
    if CAPTION_TASK in getattr(processor, "task_prompts_without_inputs", ()):
        return CAPTION_TASK
    return PROMPT if getattr(processor, "chat_template", None) is not None else ""


class PipelineCaptioner:
    """A model of transformers' pipeline `image-text-to-text`. See `open_captioner`."""

    kind, keeps_captions = "pipeline", False

    def __init__(
        self,
        source: str,
        prompt: str | None = None,
        max_new_tokens: int = 300,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        revision: str | None = None,
    ):
        from transformers import pipeline  # loads all image processors

        self.source, self.max_new_tokens = source, max_new_tokens
        self.pipeline = pipeline(
            "image-text-to-text",
            model=source,
            revision=revision,
            dtype=dtype,
            device=device,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )
        self.is_chat = getattr(self.pipeline.processor, "chat_template", None) is not None
        self.prompt = default_prompt(self.pipeline.processor) if prompt is None else prompt
        weights = hub.fingerprint(source)
        self.fingerprint = _digest(self.kind, weights, self.prompt, max_new_tokens, dtype)

    def caption(self, paths: Sequence[Path], names: Sequence[str] | None = None) -> Iterator[ImageCaption]:
        for name, path in zip(_names(paths, names), paths, strict=True):
            began = perf_counter()
            images, errors = _read_images({name: path})
            caption = None
            try:
                caption = self._write(images[name]) if images else None
            except ValueError as error:  # such as for an image of one pixel, or a prompt without a place for an image
                errors[name] = f"the model does not take it: {error}"
            yield ImageCaption(name, caption, errors.get(name), perf_counter() - began)

    def _write(self, image: Any) -> str:
        settings = {"generate_kwargs": {"max_new_tokens": self.max_new_tokens, "do_sample": False}}
        if self.is_chat:
            content = [{"type": "image", "image": image}, {"type": "text", "text": self.prompt}]
            chat = [{"role": "user", "content": content if self.prompt else content[:1]}]
            (found,) = self.pipeline(text=chat, return_full_text=False, **settings)
        else:
            (found,) = self.pipeline(image, text=self.prompt, return_full_text=False, **settings)
        return found["generated_text"].strip()


class EndpointCaptioner:
    """A model behind an OpenAI-compatible endpoint. See `open_captioner`.

    Attributes:
        endpoint: With the `totals` of tokens and price.
        on_answer: Called with 1 after each answer, as it comes.
    """

    kind, keeps_captions = "endpoint", True

    def __init__(self, source: str, settings: EndpointSettings, prompt: str | None, log: Path):
        self.source, self.prompt = source, PROMPT if prompt is None else prompt
        log.parent.mkdir(parents=True, exist_ok=True)
        self.endpoint = Endpoint(settings, log)
        self.on_answer: Callable[[int], Any] = lambda answers: None
        asked = (settings.base_url, settings.model, settings.max_tokens, settings.temperature)
        self.fingerprint = _digest(self.kind, *asked, self.prompt)

    def caption(self, paths: Sequence[Path], names: Sequence[str] | None = None) -> Iterator[ImageCaption]:
        """As `Captioner.caption`.

        Raises:
            EndpointError, PriceReached: As `endpoint.Endpoint.ask`.
        """
        names = _names(paths, names)
        size = QUESTIONS_PER_ROUND * self.endpoint.settings.concurrency
        for start in range(0, len(paths), size):
            batch = dict(zip(names[start : start + size], paths[start : start + size], strict=True))
            errors: dict[str, str] = {}
            answers = {own.name: own for own in self.endpoint.ask(self._questions(batch, errors), self.on_answer)}
            for name in batch:
                if name in errors:
                    yield ImageCaption(name, None, errors[name])
                else:
                    answer = answers[name]
                    text = None if answer.text is None else answer.text.strip()
                    yield ImageCaption(name, text, answer.error, answer.seconds, answer.finish_reason == "length")

    def _questions(self, batch: Mapping[str, Path], errors: dict[str, str]) -> Iterator[Question]:
        """The question of each image that can be read; the reasons of the others go into `errors`."""
        for name, path in batch.items():
            try:
                image = image_part(path.read_bytes())
            except OSError as error:
                errors[name] = f"it cannot be read: {error.strerror}"
                continue
            words = [{"type": "text", "text": self.prompt}] if self.prompt else []
            yield Question(name, [{"role": "user", "content": [image, *words]}], can_be_empty=True)


class FileCaptioner:
    """The captions of a JSON file `{image: caption}`, as `vlv caption` writes it."""

    kind, keeps_captions = "file", True

    def __init__(self, source: str):
        self.source = source
        self.captions = read_captions(source)
        self.fingerprint = _digest(self.kind, json.dumps(self.captions))

    def caption(self, paths: Sequence[Path], names: Sequence[str] | None = None) -> Iterator[ImageCaption]:
        """As `Captioner.caption`, found by the names as `match_names` does it.

        Raises:
            ValueError: If an image could have two captions, or two images one.
        """
        names = _names(paths, names)
        matches = match_names(names, self.captions, self.source)
        for name in names:
            if name in matches:
                yield ImageCaption(name, self.captions[matches[name]])
            else:
                yield ImageCaption(name, None, f"{self.source} has no caption of it")


def caption_images(
    captioner: Captioner,
    images: Mapping[str, Path],
    log: Path,
    advance: Callable[[int], Any] = lambda images: None,
) -> list[ImageCaption]:
    """The captions of images in their order, kept on disk, so that an ended run goes on. Failed images are repeated.

    An empty caption is a caption: it is kept and measured. `caption_notes` counts those.

    Args:
        images: Files by name.
        log: JSON lines. A caption in it counts for the same captioner, name and content of the image.
        advance: Called with 1 after each image.
    """
    known = {} if captioner.keeps_captions else _read_log(log, captioner, images)
    advance(len(known))
    missing = [name for name in images if name not in known]
    if not captioner.keeps_captions:
        log.parent.mkdir(parents=True, exist_ok=True)
        end_last_line(log)
    for own in captioner.caption([images[name] for name in missing], missing):
        known[own.name] = own
        if own.error is None and not captioner.keeps_captions:
            entry = {"captioner": captioner.fingerprint, "image": file_digest(images[own.name]), **asdict(own)}
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        advance(1)
    return [known[name] for name in images]


def caption_notes(found: Sequence[ImageCaption], limit: str = "max_new_tokens") -> list[str]:
    """Notes on the captions that are empty and on those that are cut off, with the number and a name.

    Args:
        limit: What the setting of the most tokens is called.
    """
    count, notes = sum(own.caption is not None for own in found), []
    if empty := [own.name for own in found if own.is_empty]:
        notes.append(f"{len(empty)} of {count} captions are empty, such as that of {empty[0]!r}; they count")
    if cut := [own.name for own in found if own.is_cut]:
        notes.append(
            f"{len(cut)} of {count} captions are cut off at the most tokens, such as that of {cut[0]!r}; raise {limit}"
        )
    return notes


def _read_log(log: Path, captioner: Captioner, images: Mapping[str, Path]) -> dict[str, ImageCaption]:
    """The captions that a log has for this captioner and these images. Unfinished lines are passed over."""
    found: dict[str, ImageCaption] = {}
    if not log.exists():
        return found
    digests: dict[str, str] = {}
    with log.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(ValueError, KeyError, TypeError, OSError):
                entry = json.loads(line)
                own = ImageCaption(**{key: entry[key] for key in ImageCaption.__dataclass_fields__ if key in entry})
                if entry["captioner"] != captioner.fingerprint or own.name not in images:
                    continue
                if own.name not in digests:
                    digests[own.name] = file_digest(images[own.name])
                if entry["image"] == digests[own.name]:
                    found[own.name] = replace(own, error=None)
    return found


def _names(paths: Sequence[Path], names: Sequence[str] | None) -> list[str]:
    """Raises `ValueError` if names are missing or stand twice."""
    found = [path.name for path in paths] if names is None else list(names)
    if len(found) != len(paths) or len(set(found)) != len(found):
        raise ValueError(f"{len(paths)} images need as many different names, got {len(set(found))}; pass names")
    return found


def _read_images(files: Mapping[str, Path]) -> tuple[dict[str, Any], dict[str, str]]:
    """Upright RGB images by name, and the reasons why the others cannot be read."""
    images, errors = {}, {}
    for name, path in files.items():
        try:
            images[name] = to_rgb(str(path))
        except (OSError, ValueError) as error:
            errors[name] = str(error)
    return images, errors


def _digest(*parts: Any) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
