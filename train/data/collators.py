"""Collators: batches of images, or of images and captions, without what cannot be read."""

import os
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from transformers.utils import logging

from vlv import VLVImageProcessor, VLVProcessor
from vlv.image_files import is_url
from vlv.processing_vlv import to_rgb

from .captions import check_prompt
from .source import UnreadableImage

if TYPE_CHECKING:
    from .feature_cache import FeatureCache

logger = logging.get_logger(__name__)


def readable_items(dataset: Any, count: int, image_processor: VLVImageProcessor) -> list[dict]:
    """The first `count` items whose image `load_item` can read, with the images that it returns, not augmented.

    Tries at most 1000 items. Says so if none can be read.
    """
    items: list[dict] = []
    first = (
        islice(dataset, 1000)
        if not hasattr(dataset, "__len__")
        else map(dataset.__getitem__, range(min(1000, len(dataset))))
    )
    for item in first:
        try:
            items.append(item | {"image": load_item({"image": item["image"]}, image_processor)})
        except ValueError:
            continue
        if len(items) == count:
            break
    if not items:
        logger.warning("there are no validation samples: none of the first images can be read")
    return items


def load_item(item: dict[str, Any], image_processor: VLVImageProcessor) -> Image.Image:
    """The upright RGB image of an item, cropped to the processor's `pre_crop_size`, with the item's augmentation.

    Raises:
        ValueError: If it cannot be read, or is a URL.
    """
    image, augmentation = item["image"], item.get("augmentation") or {}
    if isinstance(image, UnreadableImage):
        raise ValueError(image.reason)
    if isinstance(image, str) and is_url(image):
        raise ValueError(f"{image:.80} is a URL; download the images first (for example with img2dataset)")
    size = image_processor.pre_crop_size
    if "crop" in augmentation and size:
        loaded = _crop_square(to_rgb(image), size, *augmentation["crop"])
    else:
        loaded = image_processor.load(image)
    return loaded.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if augmentation.get("flip") else loaded


def _crop_square(image: Image.Image, size: int, x: float, y: float) -> Image.Image:
    """The largest square of an image, `size` pixels wide, at the shares `x` and `y` (0..1) of the way it can move."""
    side = min(image.size)
    left, top = x * (image.width - side), y * (image.height - side)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))


def item_name(item: dict[str, Any]) -> str:
    """What messages call the image of an item."""
    image = item["image"]
    return str(getattr(image, "name", None) or (image if isinstance(image, str) else "an image"))


def diffusion_pixels(images: list[Image.Image], size: int) -> torch.Tensor:
    """Images, as `load_item` returns them, to `(B, 3, size, size)`, uint8."""
    square = (size, size)
    arrays = [np.asarray(image if image.size == square else image.resize(square)) for image in images]  # (S, S, 3)
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


MAX_UNREADABLE_BATCHES = 100
"""After this many batches in a row without a readable image, training ends with an error."""


class _SkippingCollator:
    """Leaves out unreadable items, logs each once, and adds their number to the batch as `num_skipped`.

    The batch also has `skipped`, what was said about them, where there are any: a trainer adds it to `said` of its own
    collator, so that the data loader's workers of the next epoch do not say it again.

    If no item of a batch is readable, the last readable item of an earlier batch takes their place, because a training
    step needs a batch.

    Raises:
        ValueError: If `on_bad_image` is neither `"skip"` nor `"error"`.
    """

    def __init__(self, on_bad_image: str = "skip"):
        if on_bad_image not in ("skip", "error"):
            raise ValueError(f"on_bad_image is {on_bad_image!r}; expected 'skip' or 'error'")
        self.on_bad_image = on_bad_image
        self.last_readable: tuple[dict, Any] | None = None
        self.num_unreadable_batches = 0
        self.said: set[str] = set()
        """Messages about unreadable items so far."""

    def load_readable(
        self, items: list[dict], image_processor: VLVImageProcessor
    ) -> tuple[list[dict], list[Any], list[str]]:
        """Readable items, their images, and a message about each unreadable item.

        Raises:
            ValueError: If an item is unreadable and `on_bad_image` is `"error"`, or no item can be returned.
        """
        readable, images, messages = [], [], []
        for item in items:
            try:
                image = load_item(item, image_processor)
                if not isinstance(item.get("caption", ""), str):
                    raise ValueError(
                        f"the caption is a {type(item['caption']).__name__}, not text: {item['image']!r:.80}"
                    )
                if not item.get("caption", "-").strip():
                    raise ValueError(f"the caption is empty: {item['image']!r:.80}")
                check_prompt(item.get("prompt"), f"{item['image']!r:.80}")
            except ValueError as error:
                name = getattr(item["image"], "name", None)  # of an image that is not a file of its own
                message = f"{name}: {error}" if name else str(error)
                if self.on_bad_image == "error":
                    raise ValueError(message) from error
                messages.append(message)
                if message not in self.said:
                    logger.warning(f"skipped an image: {message}")
                    self.said.add(message)
                continue
            readable.append(item)
            images.append(image)
        self.num_unreadable_batches = 0 if readable else self.num_unreadable_batches + 1
        if readable:
            self.last_readable = (readable[-1], images[-1])
        elif self.last_readable is None or self.num_unreadable_batches > MAX_UNREADABLE_BATCHES:
            raise ValueError(f"none of the {len(items)} images of a batch can be read; is this the right data?")
        else:
            readable, images = [self.last_readable[0]], [self.last_readable[1]]
        return readable, images, messages


def describe_skipped(messages: list[str]) -> dict[str, Any]:
    """What a batch has about the items that it lacks."""
    # an int: reading a tensor would wait for the device
    return {"num_skipped": len(messages), **({"skipped": messages} if messages else {})}


def name_of(image: Any) -> str:
    """What messages call an image: its path, or the name that its source gave it."""
    if isinstance(image, str | os.PathLike):
        return os.fspath(image)
    return getattr(image, "name", None) or getattr(image, "filename", None) or "an image without a name"


def describe(items: list[dict]) -> dict[str, list]:
    """The `names` of the images of a batch, and their `places` in an evaluation set."""
    places = {"places": [item["place"] for item in items]} if "place" in items[0] else {}
    return {"names": [name_of(item["image"]) for item in items], **places}


def prompts_of(items: list[dict]) -> list[str] | None:
    """The instructions of items, with "" for those without one; None if no item has one."""
    values = [item.get("prompt") for item in items]
    prompts = [value if isinstance(value, str) and value.strip() else "" for value in values]
    return prompts if any(prompts) else None


def look_up(cache: "FeatureCache", images: list[Image.Image], items: list[dict]) -> torch.Tensor:
    """The tensors of images in a cache, `(B, ...)`."""
    return torch.stack([cache.get(image, item_name(item)) for image, item in zip(images, items, strict=True)])


def count_samples(batch: dict[str, Any]) -> int:
    """The number of images, or of pairs, that a collator has put into a batch."""
    return len(next(batch[name] for name in ("labels", "pixel_values", "image_features") if name in batch))


def find_repeated(items: list[dict]) -> tuple[list[int], list[int]]:
    """Which items are the first with their image, and of each item the place of its image among those."""
    places: dict[Any, int] = {}
    first: list[int] = []
    indices: list[int] = []
    for number, item in enumerate(items):
        image = item["image"]
        name = image if isinstance(image, str | bytes) else id(image)
        key = (name, repr(item.get("augmentation")))
        if key not in places:
            places[key] = len(first)
            first.append(number)
        indices.append(places[key])
    return first, indices


class Stage1Collator(_SkippingCollator):
    """Batches of images: `pixel_values` for the encoder and `diffusion_pixels` for the diffusion model.

    A batch also has the images' `names`, and their `places` where the items have a `place`.

    Args:
        image_processor: Loads and crops the images, and gives `pixel_values` `(B, 3, height, width)`.
        diffusion_image_size: Side S in pixels of `diffusion_pixels` `(B, 3, S, S)`, uint8 in 0..255.
        on_bad_image: `"skip"` or `"error"`.
        moments: A cache. Batches then have `moments` `(B, 2 * C, h, w)` in the place of `diffusion_pixels`.
        features: A cache. Batches then have `image_features` in the place of `pixel_values`.
    """

    def __init__(
        self,
        image_processor: VLVImageProcessor,
        diffusion_image_size: int,
        on_bad_image: str = "skip",
        moments: "FeatureCache | None" = None,
        features: "FeatureCache | None" = None,
    ):
        super().__init__(on_bad_image)
        self.image_processor, self.diffusion_image_size = image_processor, diffusion_image_size
        self.moments, self.features = moments, features

    def __call__(self, items: list[dict]) -> dict[str, Any]:
        items, images, skipped = self.load_readable(items, self.image_processor)
        if self.moments is None:
            targets = {"diffusion_pixels": diffusion_pixels(images, self.diffusion_image_size)}
        else:
            targets = {"moments": look_up(self.moments, images, items)}
        if self.features is None:
            inputs = self.image_processor(images, return_tensors="pt", pre_crop_size=None)
        else:
            inputs = {"image_features": look_up(self.features, images, items)}
        return {**inputs, **targets, **describe(items), **describe_skipped(skipped)}


class Stage2Collator(_SkippingCollator):
    """Batches of pairs: `pixel_values` `(B, 3, height, width)` and `labels` `(B, L)`, where -100 marks padding.

    A batch also has the images' `names`, and their `places` where the items have a `place`. If an item has a `prompt`,
    an instruction that stands before its caption, the batch has `input_ids` and `attention_mask` `(B, P)`. An image
    with several captions in a batch is there once: `pixel_values` has N rows, and `image_indices` `(B,)` tells the row
    of each caption.

    Args:
        processor: Prepares images and captions.
        max_caption_tokens: Longer captions are cut to this length.
        on_bad_image: `"skip"` or `"error"`.
        append_eos, pad_to_max_length: As in [`VLVProcessor`]'s call; the authors' code has False and True.
        features: A cache. Batches then have `image_features` in the place of `pixel_values`.
        conditioning: A cache. Batches then have `conditioning` `(N, Q, d_cond)` in their place.
    """

    def __init__(
        self,
        processor: VLVProcessor,
        max_caption_tokens: int,
        on_bad_image: str = "skip",
        append_eos: bool = True,
        pad_to_max_length: bool = False,
        features: "FeatureCache | None" = None,
        conditioning: "FeatureCache | None" = None,
    ):
        super().__init__(on_bad_image)
        self.processor, self.max_caption_tokens = processor, max_caption_tokens
        self.append_eos, self.pad_to_max_length = append_eos, pad_to_max_length
        self.caches = {"image_features": features, "conditioning": conditioning}

    def __call__(self, items: list[dict]) -> dict[str, Any]:
        items, images, skipped = self.load_readable(items, self.processor.image_processor)
        first, indices = find_repeated(items)
        caches = {name: cache for name, cache in self.caches.items() if cache is not None}
        batch = self.processor(
            text=prompts_of(items),
            suffix=[item["caption"] for item in items],
            max_length=self.max_caption_tokens,
            append_eos=self.append_eos,
            pad_to_max_length=self.pad_to_max_length,
        )
        images_once, items_once = [images[n] for n in first], [items[n] for n in first]
        if caches:
            batch |= {name: look_up(cache, images_once, items_once) for name, cache in caches.items()}
        else:
            batch |= self.processor.image_processor(images_once, return_tensors="pt", pre_crop_size=None)
        if len(first) < len(items):
            batch["image_indices"] = torch.tensor(indices)
        return {**batch, **describe(items), **describe_skipped(skipped)}
