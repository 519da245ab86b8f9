"""VLV's image processor: the one place where images become pixel values."""

import base64
import errno
import importlib
import io
import json
import os
import shutil
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
import torch
from huggingface_hub import get_session
from PIL import ExifTags, Image, UnidentifiedImageError
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ChannelDimension
from transformers.processing_utils import ImagesKwargs
from transformers.utils import cached_file

WIDE_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
# Beyond this ratio of the sides, resizing before the crop would make an image many times the size of the crop.
MAX_RATIO_FOR_RESIZE_FIRST = 16
ORIENTATIONS = {  # of EXIF (CIPA DC-008, 4.6.5), and the transposition that makes an image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(image: Any) -> Image.Image:
    """Converts any kind of image to an upright 8-bit RGB image.

    Transparent pixels are composited over white. 16-bit values are divided by 257. Images of mode "F" and float arrays
    must lie in 0..1. The EXIF orientation is applied; other metadata is ignored, whatever it holds. Of an animation in
    a file the first frame is used, of an animation that is open already the current frame. The caller's image is not
    changed.

    Args:
        image: A PIL image, a path, a URL, a data URI, a base64 string, bytes, or a numpy or torch array of shape
            (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels: uint8, uint16, bool, or float in 0..1. If both the
            first and the last axis could be channels, a torch tensor is read as channels first and a numpy array as
            channels last.

    Raises:
        ValueError: If the input cannot be read as an image, with the reason. The message quotes at most 80 characters
            of the input.
    """
    if isinstance(image, Image.Image):
        return _pil_to_rgb(image)
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return _array_to_rgb(image)
    if isinstance(image, str) and image.startswith(("http://", "https://", "data:")):
        return _open_bytes((_decode_data_uri if image.startswith("data:") else _download)(image), _shorten(image))
    if isinstance(image, (str, os.PathLike)):
        return _open_path(os.fspath(image))
    if isinstance(image, (bytes, bytearray, memoryview)):
        data = bytes(image)
        return _open_bytes(data, f"{len(data)} bytes")
    kinds = "a PIL image, path, URL, base64 string, bytes, numpy or torch array"
    raise ValueError(f"a {type(image).__name__} is not an image; expected {kinds}")


def _shorten(text: str) -> str:
    """At most 80 characters of an input, for an error message: its end, which tells paths apart."""
    return text if len(text) <= 80 else "..." + text[-77:]


def _decode_data_uri(uri: str) -> bytes:
    """The bytes of `data:image/png;base64,...` (RFC 2397)."""
    header, comma, payload = uri.partition(",")
    if not comma:
        raise ValueError(f"{_shorten(uri)} is not a data URI; expected data:image/...;base64,...")
    data = unquote_to_bytes(payload)
    if not header.endswith(";base64"):
        return data
    try:
        return base64.b64decode(data)
    except ValueError as error:
        raise ValueError(f"the base64 of {_shorten(header)} is damaged: {error}") from error


def _open_path(path: str) -> Image.Image:
    name = _shorten(path)
    if os.path.isdir(path):
        raise ValueError(f"{name} is a folder; give the images in it")
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # the second for a null byte
        if isinstance(error, OSError) and error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise ValueError(f"{name} could not be read: {error.strerror}") from error
        return _open_base64(path)
    return _open_bytes(data, name)


def _open_base64(text: str) -> Image.Image:
    """The image in a base64 string. Line breaks are allowed. Other text is taken for a path that does not exist."""
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
        with Image.open(io.BytesIO(data)):
            pass
    except (ValueError, OSError) as error:  # of base64, and of Pillow for other content
        raise ValueError(f"{_shorten(text)} does not exist") from error
    return _open_bytes(data, f"{len(data)} bytes of base64")


def _open_bytes(data: bytes, name: str) -> Image.Image:
    """The image in the bytes of a file; errors call it `name`."""
    if not data:
        raise ValueError(f"{name} is empty (0 bytes)")
    try:
        try:
            return _decode(data)
        except ValueError as error:
            if "MAX_TEXT" not in str(error) and "too large" not in str(error):
                raise
            return _decode(_without_png_metadata(data))  # Pillow refuses large texts and profiles beside the pixels
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image in a format that can be read{_missing_package(data)}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large to be decoded safely: {error}") from error
    except MemoryError as error:
        raise ValueError(f"{name} is too large for the memory of this machine") from error
    except Exception as error:  # Pillow's decoders raise OSError, TypeError, struct.error, ... for damaged files
        raise ValueError(f"{name} is damaged: {error}") from error


def _missing_package(data: bytes) -> str:
    """The package that reads a format which Pillow alone does not, for an error message."""
    if data[4:8] == b"ftyp" and data[8:11] in (b"hei", b"hev", b"mif", b"msf"):
        return "; HEIC needs the package pillow-heif"
    return "; JPEG XL needs the package pillow-jxl-plugin" if data[:2] == b"\xff\x0a" or data[4:8] == b"JXL " else ""


def _decode(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        if not add_formats():
            raise
        image = Image.open(io.BytesIO(data))
    with image:
        return _pil_to_rgb(image)


@cache
def add_formats() -> bool:
    """Registers HEIC and JPEG XL with Pillow, where their packages are installed; returns whether one is."""
    found = False
    for package in ("pillow_heif", "pillow_jxl"):  # the second registers itself
        with suppress(ImportError):
            getattr(importlib.import_module(package), "register_heif_opener", lambda: None)()
            found = True
    return found


def _without_png_metadata(data: bytes) -> bytes:
    """A PNG file without texts and colour profile."""
    kept, position = [data[:8]], 8  # the signature
    while position + 8 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        if data[position + 4 : position + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept.append(data[position:end])
        position = end
    return b"".join(kept)


def _download(url: str) -> bytes:
    try:
        response = get_session().get(url, timeout=30, follow_redirects=True)
        response.raise_for_status()
    except Exception as error:  # the HTTP library of huggingface_hub and its exceptions differ between versions
        raise ValueError(f"{_shorten(url)} could not be downloaded: {_shorten(str(error))}") from error
    return response.content


def _pil_to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    image = _upright(image)
    if image.width < 1 or image.height < 1:
        raise ValueError(f"the image has no pixels: {image.width} x {image.height}")
    if image.mode in WIDE_MODES:
        return _array_to_rgb(_wide_values(image))
    if image.mode == "F":
        return _array_to_rgb(np.asarray(image))
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def _upright(image: Image.Image) -> Image.Image:
    """The image turned by its EXIF orientation. EXIF that cannot be parsed is ignored."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # SyntaxError for data that is not TIFF, struct.error, KeyError, ...
        return image
    method = ORIENTATIONS.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _wide_values(image: Image.Image) -> np.ndarray:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"the image has values from {values.min()} to {values.max()}; expected 16 bits, 0 to 65535")
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
        raise ValueError(f"an array of shape {shape} is not an image; expected (H, W), (H, W, C) or (C, H, W)")
    first, last = array.shape[0] in (1, 3, 4), array.shape[2] in (1, 3, 4)
    if not first and not last:
        raise ValueError(f"an array of shape {shape} is not an image; expected 1, 3 or 4 channels, first or last")
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
    """Resizes the shorter side to `size` pixels (bilinear), then crops the square in the middle.

    The authors' code does this with 384. An image much longer than wide is cropped while it is resized; the result
    agrees to within one grey level.
    """
    width, height = image.size
    resized = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
    left, top = round((resized[0] - size) / 2), round((resized[1] - size) / 2)
    if max(width, height) <= MAX_RATIO_FOR_RESIZE_FIRST * min(width, height):
        return image.resize(resized, Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    x, y = width / resized[0], height / resized[1]
    box = (left * x, top * y, min((left + size) * x, width), min((top + size) * y, height))
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def flatten_images(images: Any) -> list[Any]:
    """Returns a list of single images for one image, a batch array `(B, ...)`, or a nested list."""
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    if isinstance(images, (list, tuple)):
        return [image for item in images for image in flatten_images(item)]
    return [images]


class VLVImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """
    pre_crop_size (`int`, *optional*): Side in pixels of the square that images are cropped to first.
    """

    pre_crop_size: int | None


class WithoutInheritedCode:
    """A subclass in a user's module is not saved as remote code, unless the user registers it, too."""

    _auto_class: Any = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls._auto_class = vars(cls).get("_auto_class")


class VLVImageProcessor(WithoutInheritedCode, PilBackend):
    r"""
    Converts images of any mode, size and orientation to `pixel_values`. Uses Pillow, not torchvision.

    Args:
        size (`dict`, *optional*, defaults to 768 x 768):
            Height and width in pixels of the encoder's input. Images are resized to it without keeping their aspect
            ratio.
        pre_crop_size (`int`, *optional*):
            Side in pixels of the square that images are cropped to first. The authors' models are trained with 384 and
            never see the edges of an image that is not square. None uses the whole image, squeezed.
        resample (`int`, *optional*, defaults to `3`): Pillow's filter of the resize to `size`; bicubic as Florence-2.
        image_mean, image_std (`list[float]`, *optional*): Default to ImageNet's.
        do_center_crop, crop_size (*optional*): Crops the middle of the resized image, as every image processor does.
        do_pad, pad_size (*optional*):
            Pads the normalised image with zeros at the bottom and the right; by default to the largest of the batch.

    Raises:
        ValueError: If an image cannot be read; the message gives its index and the reason.
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

    _origin = ""  # where it was loaded from: a folder or a repo id

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if isinstance(loaded, cls):
            loaded._origin = os.fspath(pretrained_model_name_or_path)
        return loaded

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name != "_origin"}

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs) -> list[str]:
        """Writes the configuration, and the code that it names, into a folder or a Hub repository."""
        write_code([self], Path(save_directory), self._origin)
        write_code_of_tokenizer(Path(save_directory), self._origin)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def load(self, image: Any) -> Image.Image:
        """The upright RGB image, cropped to `pre_crop_size` if that is set: the input of encoder and diffusion."""
        rgb = to_rgb(image)
        return crop_to_square(rgb, self.pre_crop_size) if self.pre_crop_size else rgb

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        return image_url_or_urls  # `to_rgb` opens paths, URLs and bytes one by one, so that an error can name its item

    def _preprocess_image_like_inputs(self, images: Any, *args, **kwargs) -> BatchFeature:
        flat = flatten_images(images)
        if not flat:
            raise ValueError("expected at least one image, got none")
        pixel_values = []
        for index, image in enumerate(flat):
            try:
                rgb = to_rgb(image)
            except ValueError as error:
                raise ValueError(f"image {index} of {len(flat)}: {error}") from error
            # `do_rescale=False` says that values are in 0..1 already. `to_rgb` turns such floats into bytes.
            rescaled = isinstance(image, (np.ndarray, torch.Tensor)) and "float" in str(image.dtype)
            pixel_values.append(self._to_pixel_values(rgb, rescaled=rescaled, **kwargs))
        if kwargs.get("do_pad"):
            pixel_values = self.pad(pixel_values, pad_size=kwargs.get("pad_size"))
        if kwargs.get("data_format") == ChannelDimension.LAST:
            pixel_values = [values.transpose(1, 2, 0) for values in pixel_values]
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=kwargs.get("return_tensors"))

    def _to_pixel_values(
        self, rgb: Image.Image, *, size, resample, rescaled: bool, pre_crop_size=None, **kwargs
    ) -> np.ndarray:
        """`(3, height, width)` float32."""
        if pre_crop_size:
            rgb = crop_to_square(rgb, pre_crop_size)
        if kwargs["do_resize"] and not (size.height and size.width):
            raise ValueError(f'size is {dict(size)}; expected {{"height": ..., "width": ...}}, in pixels')
        if kwargs["do_resize"] and rgb.size != (size.width, size.height):
            rgb = rgb.resize((size.width, size.height), resample)
        values = np.asarray(rgb)  # (height, width, 3)
        if kwargs.get("do_center_crop"):
            values = self.center_crop(values.transpose(2, 0, 1), kwargs["crop_size"]).transpose(1, 2, 0)
        values = values.astype(np.float32)
        if kwargs["do_rescale"] or rescaled:
            values *= np.float32(kwargs["rescale_factor"] if kwargs["do_rescale"] else 1 / 255)
        if kwargs["do_normalize"]:
            values = (values - np.float32(kwargs["image_mean"])) / np.float32(kwargs["image_std"])
        return np.ascontiguousarray(values.transpose(2, 0, 1))


def write_code_of_tokenizer(folder: Path, origin: str) -> None:
    """Copies the code that `tokenizer_config.json` in `folder` names; a tokenizer's own `save_pretrained` does not.

    transformers' pipelines save tokenizer and image processor, and no processor.
    """
    path = folder / "tokenizer_config.json"
    if path.is_file() and (auto_map := (content := json.loads(path.read_text(encoding="utf-8"))).get("auto_map")):
        named = SimpleNamespace(auto_map=dict(auto_map))
        write_code([named], folder, origin)
        if named.auto_map != auto_map:
            text = json.dumps({**content, "auto_map": named.auto_map}, indent=2, ensure_ascii=False)
            path.write_text(text + "\n", encoding="utf-8")


PROCESSOR_CODE = ("processing_vlv", "processing_vlv_captioner")  # this file, and the captioner's, which imports it


def _find_code(code: str, origin: str) -> Path | None:
    """The file of a module: beside this file, or in `origin`, a folder or cached repo."""
    path = Path(__file__).with_name(f"{code}.py")
    if path.exists():
        return path
    try:
        found = cached_file(origin, path.name, local_files_only=True, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):  # no such folder or repository
        return None
    return Path(found) if found else None


def write_code(parts: list[Any], folder: Path, origin: str = "") -> None:
    """Copies the code that a part's `auto_map` names into `folder`, and makes the names local ones.

    Args:
        origin: The folder or repository that the parts are from. An image processor's module is loaded alone there.
    """
    for part in parts:
        auto_map = getattr(part, "auto_map", None) or {}
        for name, reference in auto_map.items():
            module, _, class_name = (
                (reference if isinstance(reference, str) else "").rpartition("--")[2].partition(".")
            )
            if (module, class_name) == ("processing_vlv", "VLVProcessor"):  # its place in version 0.2.0
                module = "processing_vlv_captioner"
            codes = PROCESSOR_CODE[: PROCESSOR_CODE.index(module) + 1] if module in PROCESSOR_CODE else ()
            sources: list[Any] = [_find_code(code, origin) for code in codes]
            if sources and all(sources):
                auto_map[name] = f"{module}.{class_name}"
                folder.mkdir(parents=True, exist_ok=True)
                for source in sources:
                    target = folder / source.name
                    if not (target.exists() and target.samefile(source)):
                        shutil.copyfile(source, target)


__all__ = ["VLVImageProcessor"]
