"""Images are read despite damaged metadata, the caller's image is unchanged, and errors are short."""

import base64
import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from vlv import VLVImageProcessor
from vlv.processing_vlv import ORIENTATIONS, to_rgb

from ..interpreter import run_python


def scene(width: int = 40, height: int = 24) -> Image.Image:
    """An image without symmetry, in flat colours that JPEG keeps."""
    values = np.zeros((height, width, 3), np.uint8)
    values[: height // 2, : width // 2] = (255, 0, 0)
    values[height // 2 :, : width // 2] = (0, 255, 0)
    values[: height // 2, width // 2 :] = (0, 0, 255)
    return Image.fromarray(values)


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def with_chunk(png: bytes, name: bytes, content: bytes) -> bytes:
    """A PNG with another chunk behind its header."""
    chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return png[:33] + chunk + png[33:]


def exif(orientation: int, exposure: tuple[int, int] = (1, 100)) -> bytes:
    """EXIF with an orientation and, in its own directory, an exposure bias."""

    def entry(tag: int, kind: int, value: bytes) -> bytes:
        return struct.pack("<HHI4s", tag, kind, 1, value)

    first = struct.pack("<H", 2) + entry(0x112, 3, struct.pack("<HH", orientation, 0))
    first += entry(0x8769, 4, struct.pack("<I", 38)) + b"\0" * 4
    second = (
        struct.pack("<H", 1) + entry(0x9204, 10, struct.pack("<I", 56)) + b"\0" * 4 + struct.pack("<ii", *exposure)
    )
    return b"Exif\0\0II*\0\x08\0\0\0" + first + second


def corners(image: Image.Image) -> list[tuple]:
    right, bottom = image.width - 1, image.height - 1
    return [image.getpixel(xy) for xy in ((0, 0), (right, 0), (0, bottom), (right, bottom))]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_orientation_is_applied_once(orientation, kind):
    upright = scene()
    undo = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    stored = upright if orientation == 1 else upright.transpose(undo.get(orientation, ORIENTATIONS.get(orientation)))
    options = {"exif": exif(orientation)} if kind != "TIFF" else {"tiffinfo": {0x112: orientation}}
    if kind == "WEBP":
        options["lossless"] = True
    assert to_rgb(saved(stored, kind, **options)).tobytes() == upright.tobytes()


@pytest.mark.parametrize("orientation", [1, 6])
def test_exif_is_used_for_its_orientation_alone(orientation):
    photo = to_rgb(saved(scene(), "JPEG", exif=exif(orientation, exposure=(-2, 0)), quality=100, subsampling=0))
    assert photo.size == ((40, 24) if orientation == 1 else (24, 40))


def test_exif_that_is_not_tiff_is_ignored():
    assert to_rgb(with_chunk(saved(scene()), b"eXIf", b"no TIFF at all")).tobytes() == scene().tobytes()


def test_metadata_of_any_size_does_not_refuse_pixels():
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", "x" * 3_000_000, zip=True)
    large = saved(scene(), pnginfo=info)
    with pytest.raises(ValueError, match="too large"):
        Image.open(io.BytesIO(large)).load()
    assert to_rgb(large).tobytes() == scene().tobytes()


def test_an_open_animation_gives_its_current_frame_and_stays_there():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    animation = Image.open(io.BytesIO(saved(frames[0], "GIF", save_all=True, append_images=frames[1:])))
    animation.seek(2)
    assert to_rgb(animation).getpixel((0, 0)) == (0, 0, 255)
    assert animation.tell() == 2
    assert to_rgb(saved(frames[0], "GIF", save_all=True, append_images=frames[1:])).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "CMYK"])
def test_the_callers_image_is_not_changed(mode):
    image = scene().convert(mode)
    image.info["note"] = "mine"
    before = (image.mode, image.size, image.tobytes(), dict(image.info))
    result = to_rgb(image)
    result.putpixel((0, 0), (9, 9, 9))
    assert (image.mode, image.size, image.tobytes(), dict(image.info)) == before


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
def test_base64_strings_and_data_uris_are_images(prefix):
    text = prefix + base64.b64encode(saved(scene())).decode()
    assert to_rgb(text).tobytes() == scene().tobytes()
    processor = VLVImageProcessor(size={"height": 16, "width": 16})
    expected = processor(scene(), return_tensors="pt").pixel_values
    assert torch.equal(processor(text, return_tensors="pt").pixel_values, expected)


def test_base64_with_line_breaks_is_an_image():
    assert to_rgb(base64.encodebytes(saved(scene())).decode()).tobytes() == scene().tobytes()


@pytest.mark.parametrize(
    "text",
    [
        base64.b64encode(b"no image" * 500).decode(),
        "data:image/png;base64," + base64.b64encode(saved(scene())[:-30]).decode(),
        "data:image/png;base64," + "A" * 5_001,
        "data:" + "x" * 5_000,
        "folder/" * 700 + "a.png",
        "http://localhost:1/" + "x" * 5_000,
    ],
)
def test_errors_quote_at_most_80_characters(text):
    with pytest.raises(ValueError) as error:
        to_rgb(text)
    assert len(str(error.value)) < 300
    assert not any(text[start : start + 81] in str(error.value) for start in range(0, len(text) - 81, 7))


def test_a_file_is_named_by_its_end(tmp_path):
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    (folder / "broken.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"^\.\.\..*/broken\.png is not an image in a format that can be read$"):
        to_rgb(folder / "broken.png")


WRITE = """
import importlib, sys
from PIL import Image
module = importlib.import_module(sys.argv[2])
getattr(module, "register_heif_opener", lambda: None)()
Image.new("RGB", (64, 48), "red").save(sys.argv[1])
"""
READ = """
import sys
from vlv.processing_vlv import to_rgb
for name in sys.argv[2:]:
    sys.modules[name] = None  # as if it were not installed
image = to_rgb(sys.argv[1])
print(image.size, min(image.getpixel((9, 9))[:1]), max(image.getpixel((9, 9))[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "module", "package"),
    [("a.heic", "pillow_heif", "pillow-heif"), ("a.jxl", "pillow_jxl", "pillow-jxl-plugin")],
)
def test_a_format_of_another_package_is_read_or_the_package_is_named(name, module, package, tmp_path):
    pytest.importorskip(module)
    path = str(tmp_path / name)
    assert run_python(WRITE, [path, module], cwd=tmp_path, env=os.environ).returncode == 0
    done = run_python(READ, [path], cwd=tmp_path, env=os.environ)
    size, red, others = done.stdout.rsplit(maxsplit=2)
    assert size == "(64, 48)" and int(red) > 240 and int(others) < 15
    done = run_python(READ, [path, module], cwd=tmp_path, env=os.environ)
    assert done.returncode == 1 and f"needs the package {package}" in done.stderr
