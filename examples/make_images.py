"""Renders the example images, scenes that the miniature was not trained on: `python examples/make_images.py`."""

import random
from pathlib import Path

from PIL import Image

from vlv.miniature.render import render
from vlv.miniature.world import sample_scenes

FOLDER = Path(__file__).parent / "images"


def main() -> None:
    """Writes six images of scenes of `test` and six of `combo` (`vlv.miniature.world` defines the splits)."""
    for split in ("test", "combo"):
        rng = random.Random(f"examples/{split}")
        for number in range(6):
            scene = next(sample_scenes(rng, split, n_objects=1 + number % 3))
            Image.fromarray(render(scene, rng)).save(FOLDER / f"{split}-{number + 1}.png")


if __name__ == "__main__":
    main()
