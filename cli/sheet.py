"""One picture of many: originals above their reconstructions, captions below."""

import textwrap
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

SHOWN = 160  # pixels at least, so that small pictures can be seen
TEXT_SIZE = 13
LINE = 17


@dataclass
class Pair:
    """An original, its reconstruction, and what to write below."""

    original: Image.Image
    picture: Image.Image
    caption: str = ""


def contact_sheet(pairs: list[Pair], columns: int = 6, margin: int = 8) -> Image.Image:
    """Rows of originals, each above a row of their reconstructions and their captions."""
    width, height = pairs[0].picture.size
    enlarged = max(1, -(-SHOWN // width))
    size = (width * enlarged, height * enlarged)
    columns = min(columns, len(pairs))
    rows = -(-len(pairs) // columns)
    font = ImageFont.load_default(TEXT_SIZE)
    texts = [textwrap.wrap(pair.caption, max(8, int(size[0] / (TEXT_SIZE * 0.5)))) for pair in pairs]
    text_height = max(map(len, texts)) * LINE
    cell = (size[0] + margin, 2 * size[1] + text_height + 2 * margin)
    sheet = Image.new("RGB", (columns * cell[0] + margin, rows * cell[1] + margin), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (pair, lines) in enumerate(zip(pairs, texts, strict=True)):
        left, top = margin + index % columns * cell[0], margin + index // columns * cell[1]
        for offset, picture in enumerate((pair.original, pair.picture)):
            sheet.paste(picture.resize(size, Image.Resampling.LANCZOS), (left, top + offset * size[1]))
        for number, line in enumerate(lines):
            pen.text((left, top + 2 * size[1] + 4 + number * LINE), line, fill="black", font=font)
    return sheet
