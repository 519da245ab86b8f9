"""Draws small landscapes with captions, for docs/tutorial.md.

python examples/draw_landscapes.py FOLDER COUNT [SEED]
"""

import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

SKIES = {"blue": "#7db9e8", "pink": "#f4a6c0", "grey": "#a9adb3", "dark": "#22264a"}
SIZES = {"small": 0.7, "large": 1.25}
SIDE = 128  # pixels


def draw(random: random.Random) -> tuple[Image.Image, str]:
    """A landscape and its caption."""
    sky, size = random.choice([*SKIES]), random.choice([*SIZES])
    house, sun = random.choice(["left", "right"]), random.choice(["left", "right"])
    image = Image.new("RGB", (SIDE, SIDE), SKIES[sky])
    pen = ImageDraw.Draw(image)
    ground = random.randint(92, 100)
    pen.rectangle((0, ground, SIDE, SIDE), fill=random.choice(["#6a9a4a", "#7cab55"]))
    x, y = (26 if sun == "left" else 102) + random.randint(-6, 6), random.randint(16, 24)
    pen.ellipse((x - 11, y - 11, x + 11, y + 11), fill="#ffd23f")

    x, half = (36 if house == "left" else 92) + random.randint(-4, 4), 20 * SIZES[size]
    pen.rectangle((x - half, ground - 1.3 * half, x + half, ground), fill="#d9623b")
    roof = [(x - 1.25 * half, ground - 1.3 * half), (x, ground - 2.4 * half), (x + 1.25 * half, ground - 1.3 * half)]
    pen.polygon(roof, fill="#5d3a3a")
    pen.rectangle((x - 0.25 * half, ground - 0.7 * half, x + 0.25 * half, ground), fill="#fff3d6")

    x = SIDE - x + random.randint(-4, 4)
    pen.rectangle((x - 3, ground - 20, x + 3, ground), fill="#7a5230")
    pen.ellipse((x - 15, ground - 50, x + 15, ground - 16), fill="#2f6b35")
    return image, f"a {size} house {house} of a tree, the sun at the top {sun}, {sky} background"


def main() -> None:
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    chance = random.Random(sys.argv[3] if len(sys.argv) > 3 else "0")
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image, caption = draw(chance)
        image.save(folder / f"{number:04}.png")
        (folder / f"{number:04}.txt").write_text(caption + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
