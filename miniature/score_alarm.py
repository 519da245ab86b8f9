"""The diffusion score of a captioner's own captions as an alarm: for wrong captions, and images from another world.

`python -m vlv.miniature.score_alarm MODEL` prints the tables of docs/evaluation.md that are about confidence.
"""

import argparse
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image

from vlv import VLVForConditionalGeneration, VLVProcessor, hub
from vlv.evaluation import markdown_table
from vlv.image_files import walk_images
from vlv.pipelines import DiffusionScorer, to_pixels

from .data import evaluation_items
from .evaluation import caption_images
from .paper.out_of_distribution import FONT, render_in_noto
from .score_ranking import captions_with_a_change, load_scorer, score_in_batches

SHARE_MARKED = 0.01  # of the scenes of `test` are below the threshold that is measured
CROPS = 16  # of each photograph
IMAGE_SIZE = 64


def photo_crops(folder: Path, crops: int = CROPS) -> torch.Tensor:
    """Random square crops, `(N, 3, 64, 64)` uint8, of the images of a folder, from a third of the shorter side up."""
    squares = []
    for number, path in enumerate(_readable_images(folder)):
        photo, rng = Image.open(path).convert("RGB"), random.Random(number)
        for _ in range(crops):
            side = rng.uniform(1 / 3, 1) * min(photo.size)
            left, top = (rng.uniform(0, length - side) for length in photo.size)
            box = (left, top, left + side, top + side)
            squares.append(photo.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC, box=box))
    return to_pixels(squares)


def _readable_images(folder: Path) -> list[Path]:
    return [path for path, problem in walk_images(folder) if problem is None]


def area_under_roc(high: torch.Tensor, low: torch.Tensor) -> float:
    """How often a score of `high` is above one of `low`; equal ones count one half. 0.5 is chance, 1 is perfect."""
    differences = high[:, None] - low[None]
    return ((differences > 0).double() + 0.5 * (differences == 0)).mean().item()


def score_own_captions(
    scorer: DiffusionScorer, captioner: VLVForConditionalGeneration, processor: VLVProcessor, pixels: torch.Tensor
) -> torch.Tensor:
    """The scores `(N,)` of the captioner's greedy captions of images `(N, 3, 64, 64)` uint8."""
    captions = caption_images(captioner, processor, pixels)
    return score_in_batches(scorer, pixels, [[caption] for caption in captions])[:, 0]


def measure(
    scorer: DiffusionScorer,
    captioner: VLVForConditionalGeneration,
    processor: VLVProcessor,
    count: int,
    photos: Path | None,
    noto: Path | None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Scores `(N,)` by kind of image: the miniature's own scenes, then those with another kind of captions or images.

    Args:
        count: Scenes of each kind.
        photos: Folder of photographs; None to leave them out.
        noto: File of the font Noto Color Emoji; None to leave it out.
    """
    pixels, _ = evaluation_items("test", count)
    yield "scenes of `test`", score_own_captions(scorer, captioner, processor, pixels)
    pixels, scenes = evaluation_items("combo", count)
    yield "scenes of `combo`", score_own_captions(scorer, captioner, processor, pixels)
    captions, allowed = captions_with_a_change(scenes)
    changed = score_in_batches(scorer, pixels, captions)[:, 1:]
    yield "`combo`, captions with one wrong fact", changed[allowed]
    others = [captions[(number + 1) % count][:1] for number in range(count)]
    yield "`combo`, captions of other scenes", score_in_batches(scorer, pixels, others)[:, 0]
    if noto is not None:
        yield (
            "scenes in Noto's artwork",
            score_own_captions(scorer, captioner, processor, render_in_noto(evaluation_items("test", count)[1], noto)),
        )
    if photos is not None:
        yield "photographs", score_own_captions(scorer, captioner, processor, photo_crops(photos))


def table(found: Sequence[tuple[str, torch.Tensor]]) -> tuple[str, float]:
    """The table, and the threshold below which `SHARE_MARKED` of the scores of the first kind lie."""
    own = found[0][1]
    threshold = own.double().quantile(SHARE_MARKED).item()
    rows = []
    for kind, scores in found:
        quantiles = scores.double().quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.double)).tolist()
        marked = (scores < threshold).double().mean().item()
        auroc = "" if scores is own else f"{area_under_roc(own, scores):.3f}"
        rows.append([kind, str(len(scores)), *(f"{value:.3f}" for value in quantiles), f"{marked:.2f}", auroc])
    header = ("captions of", "captions", "5% lowest", "median", "5% highest", "marked", "AUROC against `test`")
    return markdown_table(header, rows), threshold


def present_sources(photos: Path, noto: Path) -> dict[str, Path | None]:
    """`photos` and `noto` as `measure` takes them: None, with a printed line, where there are no images."""
    problems = {
        "photos": None if photos.exists() and _readable_images(photos) else "has no images",
        "noto": None if noto.exists() else "does not exist",
    }
    present: dict[str, Path | None] = {}
    for name, path in (("photos", photos), ("noto", noto)):
        present[name] = path if problems[name] is None else None
        if problems[name] is not None:
            print(f"{path} {problems[name]}: its images are left out (--{name})")
    return present


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vlv.miniature.score_alarm", description=__doc__)
    parser.add_argument("model", help="folder of a miniature")
    parser.add_argument("--scenes", type=int, default=100, help="scenes of each kind (default: 100)")
    parser.add_argument(
        "--photos", type=Path, default=Path("examples/photos"), help="folder (default: examples/photos)"
    )
    parser.add_argument("--noto", type=Path, default=FONT, help=f"the font Noto Color Emoji (default: {FONT})")
    arguments = parser.parse_args()
    present = present_sources(photos=arguments.photos, noto=arguments.noto)
    _, scorer = load_scorer(arguments.model)
    captioner, processor = hub.load_captioner(arguments.model)
    text, threshold = table(list(measure(scorer, captioner, processor, arguments.scenes, **present)))
    print(f"{text}\n\nmarked: below {threshold:.3f}, as {SHARE_MARKED:.0%} of the captions of `test` are")


if __name__ == "__main__":
    main()
