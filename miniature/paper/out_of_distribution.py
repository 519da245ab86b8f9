"""What the miniature makes of pictures that no part of it ever saw: the same scenes in another artist's drawings.

    python -m vlv.miniature.paper.out_of_distribution --output outputs/other-style

draws some into a folder, for `vlv caption` and `vlv reconstruct`. The drawings are those of Google's Noto Color Emoji
(SIL Open Font License), Debian's package fonts-noto-color-emoji.
"""

import argparse
import functools
import random
from pathlib import Path
from typing import Any

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
from .embedding_probes import draw, embed, pipeline_of

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_SIZE = 109  # the only one that this font has


@functools.cache
def noto_artwork(name: str) -> Image.Image:
    """Noto's drawing of a concept, in place of `render.openmoji_artwork`.

    Raises:
        FileNotFoundError: If the font is not installed.
    """
    if not FONT.is_file():
        raise FileNotFoundError(f"there is no {FONT}: install Debian's package fonts-noto-color-emoji")
    image = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    font = ImageFont.truetype(str(FONT), FONT_SIZE)
    ImageDraw.Draw(image).text((12, 12), chr(int(CODEPOINTS[name], 16)), font=font, embedded_color=True)
    # Pillow blends the drawing's edges with the black that is below; without them they are smooth enough, since four
    # to six pixels become one in a scene.
    image.putalpha(image.getchannel("A").point(lambda alpha: 255 if alpha > 250 else 0))
    return crop_and_premultiply(image)


def pictures_in_another_style(scenes: list[Scene]) -> torch.Tensor:
    """`(N, 3, 64, 64)` uint8."""
    drawn = [render(scene, random.Random(f"{EVALUATION_SEED}/{i}"), noto_artwork) for i, scene in enumerate(scenes)]
    return torch.stack([torch.from_numpy(picture).permute(2, 0, 1) for picture in drawn])


def measure_another_style(
    captioner: VLVForConditionalGeneration,
    processor: VLVProcessor,
    teacher_dir: str | Path,
    scene_classifier: SceneClassifier,
    n: int = 300,
) -> dict[str, Any]:
    """Scores of captions and reconstructions of scenes of `test` in Noto's drawings, and in the world's own."""
    own, truth = evaluation_items("test", n)
    figures: dict[str, Any] = {}
    for style, pictures in (("OpenMoji", own), ("Noto", pictures_in_another_style(truth))):
        captions = caption_images(captioner, processor, pictures)
        figures[f"captions, {style}"] = score_scenes([parse_caption(caption) for caption in captions], truth)
        drawn = draw(pipeline_of(captioner.model, teacher_dir), embed(captioner.model, pictures))
        figures[f"reconstructions, {style}"] = score_scenes(scene_classifier.predict_scenes(drawn), truth)
        figures[f"the scene classifier itself, {style}"] = score_scenes(scene_classifier.predict_scenes(pictures), truth)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vlv.miniature.paper.out_of_distribution", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the pictures go")
    parser.add_argument("--pictures", type=int, default=8, help="default: 8")
    options = parser.parse_args()
    _, scenes = evaluation_items("test", options.pictures)
    options.output.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures_in_another_style(scenes)):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(options.output / f"noto-{number}.png")


if __name__ == "__main__":
    main()
