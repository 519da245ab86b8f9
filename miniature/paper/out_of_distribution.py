"""Results on images out of distribution: the same scenes with another artist's artwork.

    python -m vlv.miniature.paper.out_of_distribution --output outputs/other-style

renders some of them into a folder, for `vlv caption` and `vlv reconstruct`. The artwork is Google's Noto Color Emoji
(SIL Open Font License), from Debian's package fonts-noto-color-emoji. No part of the miniature was trained on it.
"""

import argparse
import functools
import random
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from vlv import VLVForConditionalGeneration, VLVProcessor

from ..data import EVALUATION_SEED, evaluation_items
from ..evaluation import caption_images
from ..grammar import parse_caption
from ..render import crop_and_premultiply, render
from ..scene_classifier import SceneClassifier
from ..scoring import score_scenes
from ..world import CODEPOINTS, Scene
from .embedding_probes import build_pipeline, encode_images, generate_from_embeds

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_SIZE = 109  # the only size in this font


@functools.cache
def noto_artwork(name: str, font_file: Path | None = None) -> Image.Image:
    """Noto's artwork of an object, in the form of `render.openmoji_artwork`: RGBA, premultiplied alpha, cropped.

    Args:
        font_file: The font; by default where Debian's package has it.

    Raises:
        FileNotFoundError: If the font is not installed.
    """
    file = font_file or FONT
    if not file.is_file():
        raise FileNotFoundError(f"the font {file} is not installed; install Debian's package fonts-noto-color-emoji")
    image = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    font = ImageFont.truetype(str(file), FONT_SIZE)
    ImageDraw.Draw(image).text((12, 12), chr(int(CODEPOINTS[name], 16)), font=font, embedded_color=True)
    # Pillow blends the edges with black. Without the blended pixels the edges are still smooth, because four to six
    # pixels become one in a scene.
    image.putalpha(image.getchannel("A").point(lambda alpha: 255 if alpha > 250 else 0))
    return crop_and_premultiply(image)


def render_in_noto(scenes: list[Scene], font_file: Path | None = None) -> torch.Tensor:
    """Images `(N, 3, 64, 64)` uint8 of scenes, with Noto's artwork, from the font of `noto_artwork`."""
    artwork = functools.partial(noto_artwork, font_file=font_file)
    images = [render(scene, random.Random(f"{EVALUATION_SEED}/{i}"), artwork) for i, scene in enumerate(scenes)]
    return torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in images])


def measure_out_of_distribution(
    captioner: VLVForConditionalGeneration,
    processor: VLVProcessor,
    teacher_dir: str | Path,
    scene_classifier: SceneClassifier,
    n: int = 300,
) -> dict[str, dict[str, float]]:
    """Scores of captions and reconstructions of scenes of `test`, with OpenMoji's artwork and with Noto's.

    The scene classifier's own readings of the images are scored as well.
    """
    openmoji, truth = evaluation_items("test", n)
    results = {}
    for style, images in (("OpenMoji", openmoji), ("Noto", render_in_noto(truth))):
        captions = caption_images(captioner, processor, images)
        results[f"captions, {style}"] = score_scenes([parse_caption(caption) for caption in captions], truth)
        pipeline = build_pipeline(captioner.model, teacher_dir)
        generated = generate_from_embeds(pipeline, encode_images(captioner.model, images))
        results[f"reconstructions, {style}"] = score_scenes(scene_classifier.predict_scenes(generated), truth)
        results[f"scene classifier on the originals, {style}"] = score_scenes(
            scene_classifier.predict_scenes(images), truth
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vlv.miniature.paper.out_of_distribution", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the images")
    parser.add_argument("--images", type=int, default=8, help="number of images (default: 8)")
    parser.add_argument("--pictures", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.pictures is not None:
        parser.error("--pictures is called --images now")
    _, scenes = evaluation_items("test", options.images)
    options.output.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(render_in_noto(scenes)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(options.output / f"noto-{number}.png")


if __name__ == "__main__":
    main()
