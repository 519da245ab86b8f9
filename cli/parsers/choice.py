"""The options of several captions of an image, and of their scores."""

import argparse

from .common import add_num_pairs, positive

MIN_SCORE = 0.08  # 1% of the embedded miniature's captions of its own world are below (docs/evaluation.md)


def add_choice_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of several captions and of scores."""
    add_sampling_arguments(parser)
    parser.add_argument(
        "--best-by", choices=["score"], help="keep the caption of --num-captions with the highest score (`vlv score`)"
    )
    parser.add_argument(
        "--confidence",
        action="store_true",
        help='write {"caption": ..., "score": ..., "confident": true or false}: whether the score of `vlv score` is '
        "at least --min-score",
    )
    add_min_score(parser)
    add_num_pairs(parser, default=None)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of sampled captions."""
    parser.add_argument(
        "--num-captions",
        type=positive,
        default=1,
        metavar="N",
        help="sample N captions of each image; without --best-by the output has lists (default: 1, not sampled)",
    )
    parser.add_argument(
        "--temperature", type=float, help="of the samples (default: 1.0 for several captions; one is not sampled)"
    )
    parser.add_argument("--seed", type=int, help="of the samples (default: 0)")


def add_min_score(parser: argparse.ArgumentParser) -> None:
    """Adds `--min-score`."""
    parser.add_argument(
        "--min-score",
        type=float,
        metavar="X",
        help=f"lowest score of a confident caption (default: {MIN_SCORE:g}, measured for the miniature; "
        "docs/evaluation.md says how to measure it for another model)",
    )
