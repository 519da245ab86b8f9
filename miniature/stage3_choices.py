"""How many samples, and pairs of timestep and noise, stage 3 needs for the same passes of the denoiser; which reward.

`python -m vlv.miniature.stage3_choices ROOT` trains stage 3 of the miniature (`vlv.miniature.stage3`) for a few rounds
with each number of samples G and of pairs K, and with the reward that generates an image from each caption. A round
has as many images as its passes of the denoiser allow, so more samples or pairs of an image mean fewer images. Options
that are not listed here are passed on to `vlv train stage3`. A run that was interrupted goes on.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from vlv.evaluation import markdown_table
from vlv.files import read_json

from . import stage3
from .sampled_image_score import STEPS

MEASURED = ("object_place_f1", "exact", "invented", "missing")
TITLES = [stage3.COLUMNS[name] for name in MEASURED]
HEADER = ("reward", "K", "G", "images a round", *TITLES, "F1 of each seed", "CPU seconds")


def images_of_round(passes: int, reward: str, num_pairs: int, num_captions: int) -> int:
    """Images that `passes` of the denoiser score: the samples, the greedy caption and no words of each."""
    of_caption = num_pairs if reward == "score" else 2 * STEPS
    return passes // (of_caption * (num_captions + 2))


def cells(options: argparse.Namespace) -> list[tuple[str, int, int]]:
    """Reward, K and G of the runs. Only the score has pairs."""
    found = [("score", pairs, captions) for pairs in options.num_pairs for captions in options.num_captions]
    return found + [("image", 1, captions) for captions in options.image_captions]


def run_cell(
    options: argparse.Namespace, reward: str, num_pairs: int, num_captions: int, seed: int, passed_on: Sequence[str]
) -> dict[str, Any]:
    """The results of `vlv.miniature.stage3`, of its file if the run has been measured."""
    name = f"choices-{options.passes}x{options.rounds}-{reward}-K{num_pairs}-G{num_captions}-seed-{seed}"
    settings = {
        "name": name,
        "seed": seed,
        "pairs": options.pairs,
        "images": options.images,
        "rounds": options.rounds,
        "round-images": images_of_round(options.passes, reward, num_pairs, num_captions),
        "round-steps": options.round_steps,
        "num-captions": num_captions,
        "num-pairs": num_pairs,
        "reward": reward,
        "scenes": options.scenes,
    }
    command = [options.root, *(f"--{key}={value}" for key, value in settings.items()), *passed_on]
    own, passed_on = stage3.parse_options(command)
    file = Path(options.root) / f"{name}.json"
    if file.exists() and len((known := read_json(file))["rounds"]) > options.rounds:
        if (known["settings"], known["passed_on"]) != (vars(own), passed_on):
            raise SystemExit(f"{file} was measured with other options; remove it, or name another ROOT")
        return known
    return stage3.run_stage3(own, passed_on)


def table(options: argparse.Namespace, passed_on: Sequence[str]) -> str:
    """Runs what is missing. The rows are means over the seeds, the first one of the captioners of the start."""
    rows = []
    for number, (reward, pairs, captions) in enumerate(cells(options)):
        found = [run_cell(options, reward, pairs, captions, seed, passed_on) for seed in options.seeds]
        if not number:
            rows.append(["none", "", "", "", *_figures([own["rounds"][0]["combo"] for own in found]), ""])
        images = found[0]["settings"]["round_images"]
        row = [reward, str(pairs) if reward == "score" else "", str(captions), str(images)]
        seconds = fmean(own["cpu_seconds"] for own in found)
        rows.append([*row, *_figures([own["rounds"][-1]["combo"] for own in found]), f"{seconds:.0f}"])
    return markdown_table(HEADER, rows)


def _figures(found: Sequence[dict[str, float]]) -> list[str]:
    means = [f"{fmean(own[name] for own in found):.3f}" for name in MEASURED]
    return [*means, ", ".join(f"{own['object_place_f1']:.3f}" for own in found)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vlv.miniature.stage3_choices", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("root", help="folder of everything that is trained, as of vlv.miniature.stage3")
    parser.add_argument("--pairs", type=int, default=200, help="pairs of stage 2 (default: %(default)s)")
    parser.add_argument("--images", type=int, default=6000, help="without captions (default: %(default)s)")
    parser.add_argument(
        "--passes", type=int, default=12_000, help="of the denoiser, in a round (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--round-steps", type=int, default=80, help="updates of a round (default: %(default)s)")
    parser.add_argument(
        "--num-pairs", type=int, nargs="*", default=[1, 2, 4, 8], metavar="K", help="of the score (default: 1 2 4 8)"
    )
    parser.add_argument(
        "--num-captions", type=int, nargs="*", default=[4, 12, 32], metavar="G", help="of it (default: 4 12 32)"
    )
    parser.add_argument(
        "--image-captions", type=int, nargs="*", default=[4, 12], metavar="G", help="of --reward image (default: 4 12)"
    )
    parser.add_argument("--scenes", type=int, default=300, help="captioned (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    options, passed_on = parser.parse_known_args(arguments)
    stage3.parse_options([options.root, *passed_on])
    print(table(options, passed_on))


if __name__ == "__main__":
    main()
