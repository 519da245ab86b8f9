"""VLV's processors: the one place where images become pixels and words become ids."""

import io
import os
from typing import Any

import numpy as np
import torch
from huggingface_hub import get_session
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.processing_utils import ImagesKwargs

WIDE_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
# Beyond this ratio of the sides, resizing before the crop would make a picture many times the crop's size.
MAX_RATIO_FOR_RESIZE_FIRST = 16


def to_rgb(image: Any) -> Image.Image:
    """Any kind of image as an upright 8-bit RGB picture.

    Transparency is laid over white; 16-bit values are divided by 257; "F" pictures and float arrays must lie in 0..1;
    the EXIF orientation is applied; of an animation the first frame is taken.

    Args:
        image: A PIL image, a path, a URL, bytes, or a numpy or torch array of shape (H, W), (H, W, C) or (C, H, W)
            with 1, 3 or 4 channels, uint8, uint16, bool, or float in 0..1. Where both ends could be channels, a torch
            tensor is read as channels first and a numpy array as channels last.

    Raises:
        ValueError: If this cannot be an image, with the reason.
    """
    if isinstance(image, Image.Image):
        return _pil_to_rgb(image)
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return _array_to_rgb(image)
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        return _open(io.BytesIO(_download(image)), image)
    if isinstance(image, (str, os.PathLike)):
        if os.path.isdir(image):
            raise ValueError(f"{image} is a folder; give the images in it")
        if not os.path.exists(image):
            raise ValueError(f"{image} does not exist")
        if os.path.getsize(image) == 0:
            raise ValueError(f"{image} is empty (0 bytes)")
        return _open(os.fspath(image), os.fspath(image))
    if isinstance(image, (bytes, bytearray, memoryview)):
        data = bytes(image)
        if not data:
            raise ValueError("the image is empty (0 bytes)")
        return _open(io.BytesIO(data), f"{len(data)} bytes")
    raise ValueError(f"a {type(image).__name__} is no image; expected a PIL image, path, bytes, numpy or torch array")


def _open(source: str | io.BytesIO, name: str) -> Image.Image:
    try:
        with Image.open(source) as image:
            return _pil_to_rgb(image)
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is no image in a format that can be read") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large to be decoded safely: {error}") from error
    except PermissionError as error:
        raise ValueError(f"{name} may not be read: {error.strerror}") from error
    except (ValueError, MemoryError):
        raise
    except (
        Exception
    ) as error:  # a damaged file may raise anything in Pillow's decoders: OSError, TypeError, struct.error
        raise ValueError(f"{name} is damaged: {error}") from error


def _download(url: str) -> bytes:
    try:
        response = get_session().get(url, timeout=30, follow_redirects=True)
        response.raise_for_status()
    except Exception as error:  # of whichever HTTP library huggingface_hub uses
        raise ValueError(f"{url} cannot be downloaded: {error}") from error
    return response.content


def _pil_to_rgb(image: Image.Image) -> Image.Image:
    if image.tell():
        image.seek(0)
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.width < 1 or image.height < 1:
        raise ValueError(f"the image has no pixels: {image.width} x {image.height}")
    if image.mode in WIDE_MODES:
        return _array_to_rgb(_wide_values(image))
    if image.mode == "F":
        return _array_to_rgb(np.asarray(image))
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _wide_values(image: Image.Image) -> np.ndarray:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f"the image has integer values from {values.min()} to {values.max()}; expected 16 bits, 0 to 65535"
        )
    return values.astype(np.uint16)


def _array_to_rgb(array: np.ndarray | torch.Tensor) -> Image.Image:
    channels_first_if_unclear = isinstance(array, torch.Tensor)
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.dtype == torch.bfloat16 else array).numpy()
    shape = array.shape
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or 0 in shape:
        raise ValueError(f"an array of shape {shape} is no image; expected (H, W), (H, W, C) or (C, H, W)")
    first, last = array.shape[0] in (1, 3, 4), array.shape[2] in (1, 3, 4)
    if not first and not last:
        raise ValueError(f"an array of shape {shape} is no image; expected 1, 3 or 4 channels, first or last")
    if first and (not last or (channels_first_if_unclear and len(shape) == 3)):
        array = np.moveaxis(array, 0, -1)  # (H, W, C)
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype == np.uint16:
        array = np.round(array / 257).astype(np.uint8)
    elif np.issubdtype(array.dtype, np.floating):
        low, high = array.min(), array.max()
        if not (low >= 0 and high <= 1):
            raise ValueError(f"float images must lie in 0..1, this one has {low:.4g} to {high:.4g}; divide or clip it")
        array = np.round(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(f"arrays must be uint8, or float in 0..1; this one is {array.dtype}")
    if array.shape[2] == 1:
        return Image.fromarray(np.ascontiguousarray(array[..., 0])).convert("RGB")
    return _pil_to_rgb(Image.fromarray(np.ascontiguousarray(array)))


def crop_to_square(image: Image.Image, size: int) -> Image.Image:
    """Shorter side to `size` (bilinear), then the square in the middle: what the authors' code does with 384.

    A picture much longer than wide is cropped while it is resized, which gives the same to within one grey level.
    """
    width, height = image.size
    if width <= height:
        resized = (size, int(size * height / width))
    else:
        resized = (int(size * width / height), size)
    left, top = round((resized[0] - size) / 2), round((resized[1] - size) / 2)
    if max(width, height) <= MAX_RATIO_FOR_RESIZE_FIRST * min(width, height):
        return image.resize(resized, Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    x, y = width / resized[0], height / resized[1]
    box = (left * x, top * y, min((left + size) * x, width), min((top + size) * y, height))
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def flatten_images(images: Any) -> list[Any]:
    """A list of single images from one image, a batch array `(B, ...)`, or a list, however nested."""
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    if isinstance(images, (list, tuple)):
        return [image for item in images for image in flatten_images(item)]
    return [images]


class VLVImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    pre_crop_size: int | None


class VLVImageProcessor(PilBackend):
    r"""
    Turns images of any mode, size and orientation into `pixel_values`, with Pillow alone.

    Args:
        size (`dict`, *optional*, defaults to 768 x 768):
            What the encoder takes. The picture is resized to it exactly, without regard to its shape.
        pre_crop_size (`int`, *optional*):
            First crop to a square of this many pixels. The authors' models were trained with 384, so that the edges of
            a picture that is not square are never seen; None sees all of it, squeezed.
        resample (`int`, *optional*, defaults to `3`): Pillow's filter for the second step; bicubic as Florence-2.
        image_mean, image_std (`list[float]`, *optional*): Default to ImageNet's.
    """

    resample = Image.Resampling.BICUBIC
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 768, "width": 768}  # noqa: RUF012
    pre_crop_size = None
    do_resize = True
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    do_convert_rgb = True
    valid_kwargs = VLVImageProcessorKwargs
    model_input_names = ["pixel_values"]  # noqa: RUF012

    def load(self, image: Any) -> Image.Image:
        """The upright RGB picture, cropped where `pre_crop_size` says so: what both encoder and decoder are shown."""
        picture = to_rgb(image)
        return crop_to_square(picture, self.pre_crop_size) if self.pre_crop_size else picture

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        return image_url_or_urls  # paths, URLs and bytes are opened one by one, so that an error can name its item

    def _preprocess_image_like_inputs(self, images: Any, *args, **kwargs) -> BatchFeature:
        flat = flatten_images(images)
        if not flat:
            raise ValueError("expected at least one image, got none")
        pixels = []
        for index, image in enumerate(flat):
            try:
                picture = to_rgb(image)
            except ValueError as error:
                raise ValueError(f"image {index} of {len(flat)}: {error}") from error
            pixels.append(self._to_pixels(picture, **kwargs))
        return BatchFeature({"pixel_values": pixels}, tensor_type=kwargs.get("return_tensors"))

    def _to_pixels(self, picture: Image.Image, *, size, resample, pre_crop_size=None, **kwargs) -> np.ndarray:
        """An RGB picture as `(3, height, width)` float32."""
        if pre_crop_size:
            picture = crop_to_square(picture, pre_crop_size)
        if kwargs["do_resize"] and not (size.height and size.width):
            raise ValueError(f'size is {dict(size)}; expected {{"height": ..., "width": ...}}, in pixels')
        if kwargs["do_resize"] and picture.size != (size.width, size.height):
            picture = picture.resize((size.width, size.height), resample)
        values = np.asarray(picture).astype(np.float32)  # (height, width, 3)
        if kwargs["do_rescale"]:
            values *= np.float32(kwargs["rescale_factor"])
        if kwargs["do_normalize"]:
            values = (values - np.float32(kwargs["image_mean"])) / np.float32(kwargs["image_std"])
        return np.ascontiguousarray(values.transpose(2, 0, 1))


# Users' words only, one after the other, with nothing between them and the caption: the model knows no dialogue.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endif %}{% endfor %}"
)


class VLVProcessor(ProcessorMixin):
    r"""
    Images to `pixel_values`, words before the caption to `input_ids`, the caption itself to `labels`.

    Args:
        image_processor ([`VLVImageProcessor`]): Prepares the images.
        tokenizer (`PreTrainedTokenizerBase`): The language model's own. It must have an EOS token.
        chat_template (`str`, *optional*): By default the user's words alone, which may be none.
    """

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        if tokenizer is not None and tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no EOS token, so captions could never end; set tokenizer.eos_token")
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        suffix: str | list[str] | None = None,
        return_tensors: str | None = "pt",
        max_length: int | None = None,
        append_eos: bool = True,
        pad_to_max_length: bool = False,
        **kwargs,
    ) -> BatchFeature:
        """Prepares a batch.

        Args:
            images: One image or many, of any kind that [`VLVImageProcessor`] takes.
            text (`str` or `list[str]`, *optional*): Words that the caption is to continue; may be empty. One for all
                images, or one each. Without EOS, padded on the left.
            suffix (`str` or `list[str]`, *optional*): The captions to learn, one each. They end with EOS, which is
                learnt too, and are padded on the right with -100 to the longest of the batch.
            max_length (`int`, *optional*): The most tokens of a suffix, EOS counted; a longer one is cut and then has
                no EOS, since its end is not seen.
            append_eos (`bool`, *optional*, defaults to `True`): Whether suffixes end with EOS. The authors' code adds
                none, so that its captions never learn to end.
            pad_to_max_length (`bool`, *optional*, defaults to `False`): Pads labels to `max_length` whatever their own
                lengths, as the authors' code does.

        Returns:
            `pixel_values` (B, 3, height, width), `input_ids` and `attention_mask` (B, P), `labels` (B, L); of these,
            what was asked for.

        Raises:
            ValueError: If nothing is given, or an image cannot be read; the message names which one.
        """
        if images is None and text is None and suffix is None:
            raise ValueError("give images, text or suffix")
        image_kwargs = {k: v for k, v in kwargs.items() if k in VLVImageProcessorKwargs.__annotations__}
        image_kwargs |= {k: v for k, v in kwargs.items() if k in ImagesKwargs.__annotations__}
        image_kwargs |= kwargs.get("images_kwargs") or {}
        data: dict[str, Any] = {}
        count = None
        if images is not None:
            data.update(self.image_processor(images, return_tensors=return_tensors, **image_kwargs))
            count = len(data["pixel_values"])
        if text is not None:
            texts = [text] * (count or 1) if isinstance(text, str) else list(text)
            if count is not None and len(texts) != count:
                raise ValueError(f"{len(texts)} texts for {count} images; give one for all, or one each")
            rows = [self._ids(words) for words in texts]
            data["input_ids"], data["attention_mask"] = self._pad_left(rows)
        if suffix is not None:
            captions = [suffix] if isinstance(suffix, str) else list(suffix)
            if count is not None and len(captions) != count:
                raise ValueError(f"{len(captions)} captions for {count} images; give one each")
            if pad_to_max_length and max_length is None:
                raise ValueError("pad_to_max_length needs max_length")
            data["labels"] = self._labels(captions, max_length, append_eos, pad_to_max_length)
        as_wanted = {"pt": lambda v: v, "np": lambda v: v.numpy()}.get(return_tensors or "", lambda v: v.tolist())
        return BatchFeature({k: v if k == "pixel_values" else as_wanted(v) for k, v in data.items()})

    def _ids(self, words: str) -> list[int]:
        if not isinstance(words, str):
            raise ValueError(f"texts must be strings, got {type(words).__name__}")
        return self.tokenizer(words, add_special_tokens=False).input_ids

    def _pad_left(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        length = max(map(len, rows), default=0)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        ids = torch.full((len(rows), length), pad, dtype=torch.long)
        mask = torch.zeros((len(rows), length), dtype=torch.long)
        for row, (target, filled) in zip(rows, zip(ids, mask, strict=True), strict=True):
            if row:
                target[-len(row) :] = torch.tensor(row)
                filled[-len(row) :] = 1
        return ids, mask

    def _labels(
        self, captions: list[str], max_length: int | None, append_eos: bool, pad_to_max_length: bool
    ) -> torch.Tensor:
        end = [self.tokenizer.eos_token_id] if append_eos else []
        rows = [(self._ids(caption) + end)[:max_length] for caption in captions]
        length = max(map(len, rows), default=0) if max_length is None or not pad_to_max_length else max_length
        labels = torch.full((len(rows), length), -100, dtype=torch.long)
        for row, target in zip(rows, labels, strict=True):
            target[: len(row)] = torch.tensor(row)
        return labels

    @property
    def model_input_names(self) -> list[str]:
        return ["pixel_values", "input_ids", "attention_mask"]

    def batch_decode(self, *args, **kwargs) -> list[str]:
        """As the tokenizer's."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args, **kwargs) -> str:
        """As the tokenizer's."""
        return self.tokenizer.decode(*args, **kwargs)


__all__ = ["VLVImageProcessor", "VLVProcessor"]
