"""Writes image-caption pairs of the miniature's world: `python -m vlv.miniature.pairs FOLDER --count 4000`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from .captioner import ImageCaptionPairs
from .world import SPLITS

LIST_FILE = "pairs.jsonl"


def write_pairs(folder: str | Path, count: int, split: str = "train", seed: int = 4) -> Path:
    """Writes `count` images as PNG, and a list of them with their captions.

    Args:
        seed: Of the scenes; 4 gives the pairs that the embedded captioner was trained on.

    Returns:
        The list, `pairs.jsonl`, as `--pairs` takes it.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    pairs = ImageCaptionPairs(count, split, seed)
    with open(root / LIST_FILE, "w", encoding="utf-8") as file:
        for index in range(count):
            item = pairs[index]
            name = f"{index:05}.png"
            Image.fromarray(item["image"].permute(1, 2, 0).numpy()).save(root / name)
            file.write(json.dumps({"image": name, "caption": item["caption"]}) + "\n")
    return root / LIST_FILE


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vlv.miniature.pairs", description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--count", type=int, default=4000, help="number of pairs (default: %(default)s)")
    parser.add_argument("--split", choices=SPLITS, default="train", help="split of the scenes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=4, help="seed of the scenes (default: %(default)s)")
    options = parser.parse_args(arguments)
    print(write_pairs(options.folder, options.count, options.split, options.seed))


if __name__ == "__main__":
    main()
