"""One image of many: originals above their reconstructions, captions below."""

import textwrap
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

MIN_WIDTH = 160  # pixels; smaller images are enlarged
TEXT_SIZE = 13
LINE_HEIGHT = 17
COLUMNS = 6
MARGIN = 8  # pixels


@dataclass
class Pair:
    """An original, its reconstruction, and the caption below them."""

    original: Image.Image
    reconstruction: Image.Image
    caption: str = ""


def contact_sheet(pairs: list[Pair]) -> Image.Image:
    """Rows of originals, each above a row of their reconstructions and their captions."""
    width, height = pairs[0].reconstruction.size
    scale = max(1, -(-MIN_WIDTH // width))
    size = (width * scale, height * scale)
    columns = min(COLUMNS, len(pairs))
    rows = -(-len(pairs) // columns)
    font = ImageFont.load_default(TEXT_SIZE)
    texts = [textwrap.wrap(pair.caption, max(8, int(size[0] / (TEXT_SIZE * 0.5)))) for pair in pairs]
    text_height = max(map(len, texts)) * LINE_HEIGHT
    cell = (size[0] + MARGIN, 2 * size[1] + text_height + 2 * MARGIN)
    sheet = Image.new("RGB", (columns * cell[0] + MARGIN, rows * cell[1] + MARGIN), "white")
    canvas = ImageDraw.Draw(sheet)
    for index, (pair, lines) in enumerate(zip(pairs, texts, strict=True)):
        left, top = MARGIN + index % columns * cell[0], MARGIN + index // columns * cell[1]
        for row, image in enumerate((pair.original, pair.reconstruction)):
            sheet.paste(image.resize(size, Image.Resampling.LANCZOS), (left, top + row * size[1]))
        for row, line in enumerate(lines):
            canvas.text((left, top + 2 * size[1] + 4 + row * LINE_HEIGHT), line, fill="black", font=font)
    return sheet
