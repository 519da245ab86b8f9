"""Options that several commands have."""

import argparse

from vlv.pipelines.schedulers import OWN, SCHEDULERS

DTYPE_NAMES = ("float32", "bfloat16", "float16")
NUM_PAIRS = 4


def positive(text: str) -> int:
    """An argparse type: a whole number from 1 up."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def not_negative(text: str) -> int:
    """An argparse type: a whole number from 0 up."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {value}")
    return value


def positive_number(text: str) -> float:
    """An argparse type: a number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def not_negative_number(text: str) -> float:
    """An argparse type: a number from 0 up."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be at least 0, not {text}")
    return value


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--model`, `--revision`, `--device` and `--dtype`, which are the same for all commands."""
    parser.add_argument(
        "--model",
        metavar="DIR_OR_REPO",
        help="folder or Hub repo id of a VLV (default: the embedded miniature, which knows sixteen drawings)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repo; a commit gives repeatable results")
    parser.add_argument("--device", help="such as cpu, cuda or mps (default: cuda or mps if available, else cpu)")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, default="float32", help="precision (default: float32)")


def add_num_pairs(parser: argparse.ArgumentParser, default: int | None = NUM_PAIRS) -> None:
    """Adds `--num-pairs`."""
    parser.add_argument(
        "--num-pairs",
        type=positive,
        default=default,
        metavar="K",
        help=f"passes of the denoiser for a caption's score (default: {NUM_PAIRS})",
    )


def add_scheduler_argument(parser: argparse.ArgumentParser, default: str | None = OWN, note: str = OWN) -> None:
    """Adds `--scheduler`; `note` describes the default in its help."""
    parser.add_argument(
        "--scheduler",
        metavar="NAME",
        choices=SCHEDULERS,
        default=default,
        help=f"the sampler of the denoising steps: {', '.join(SCHEDULERS[:-1])}, or {OWN} for the model's as it is "
        f"(default: {note})",
    )


def add_embeddings_cache(parser: argparse.ArgumentParser) -> None:
    """Adds `--embeddings-cache`."""
    parser.add_argument(
        "--embeddings-cache",
        metavar="DIR",
        help="keep the caption embeddings of images in a folder, and take those that are there: `vlv caption`, `vlv "
        "reconstruct` and `vlv encode` of one image run the encoder once, where the model has one encoder for them "
        "(docs/captioning.md)",
    )
