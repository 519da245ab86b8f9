"""The options of `vlv caption`."""

import argparse

from vlv.captioning.choices import KINDS, LENGTHS, MIN_LOOP_WORDS, MIN_REPEATS, NAMES, ON_EXISTING, TIME_LIMIT

from .choice import add_choice_arguments
from .common import add_embeddings_cache, add_model_arguments, positive, positive_number
from .shards import add_shard_arguments, add_speed_arguments


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "caption",
        help="write captions of images",
        description="Writes captions of images into a file (JSON: {path relative to the argument: caption}), beside "
        "the images, or into their metadata. Images are given as files, folders (searched recursively), URLs, shards "
        "or a data set. Every caption is on disk when its batch is done. An image that cannot be read is named on "
        "standard error, the other images are captioned, and the exit code is 1. A file beside the output, such as "
        "captions.resume.jsonl, records what --resume goes on with. All of it: docs/captioning.md.",
    )
    add_input_arguments(parser)
    add_output_arguments(parser)
    add_text_arguments(parser)
    add_generation_arguments(parser)
    add_choice_arguments(parser)
    add_embeddings_cache(parser)
    add_speed_arguments(parser)
    add_model_arguments(parser)
    add_shard_arguments(parser)
    parser.set_defaults(run="caption:run")


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of batches and of the search for a caption."""
    parser.add_argument(
        "--batch-size", type=positive, default=8, help="captions that are written together (default: 8)"
    )
    parser.add_argument(
        "--encoder-batch-size", type=positive, metavar="N", help="images in a pass of the encoder (default: 8)"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=300, help="most tokens of a caption (default: 300, as the paper)"
    )
    parser.add_argument("--num-beams", type=positive, default=1, help="beams; 1 is greedy (default: 1)")
    parser.add_argument(
        "--as-original",
        action="store_true",
        help="settings of the authors' Caption_inference.py: 4 beams, at most 300 tokens, the prefix rounded to "
        "bfloat16, --trim (docs/from_the_original.md)",
    )


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say what is captioned."""
    group = parser.add_argument_group("inputs")
    group.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="image files, folders, globs such as 'photos/**/*.jpg', URLs, .parquet and .tar (WebDataset) files, "
        "lists (.jsonl, .json, .csv, .tsv), or - for files, folders, shards and URLs on standard input, one a line",
    )
    group.add_argument("--embeddings", metavar="FILE", help="caption embeddings from `vlv encode`, instead of images")
    group.add_argument(
        "--dataset",
        metavar="ID_OR_DIR",
        help="a data set of the Hub, or one on disk, instead of paths: whatever `vlv train` reads",
    )
    group.add_argument(
        "--split", help="split of --dataset (default: train, or all of a folder that has no saved splits)"
    )
    group.add_argument("--dataset-revision", metavar="REV", help="branch, tag or commit of --dataset (default: main)")
    group.add_argument(
        "--image-column",
        metavar="NAME",
        help="column of the images of --dataset, parquet files and lists (default: image)",
    )
    group.add_argument(
        "--image-root", metavar="DIR", help="folder that paths in parquet files and lists start from (default: theirs)"
    )
    group.add_argument("--streaming", action="store_true", help="read --dataset while captions are written")
    group.add_argument(
        "--url-timeout",
        type=positive_number,
        default=TIME_LIMIT,
        metavar="SECONDS",
        help=f"most time of a download (default: {TIME_LIMIT:g})",
    )


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say where captions are written."""
    group = parser.add_argument_group("outputs")
    group.add_argument(
        "--output",
        metavar="FILE",
        help="a .json, .jsonl, .csv or .parquet file, or the folder of the images with a / at the end, which becomes "
        "a data set by its metadata.jsonl (default: captions.json; none with --sidecar or --metadata)",
    )
    existing = group.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        action="store_true",
        help="go on with --output: keep the captions of images that have not changed, add the others",
    )
    existing.add_argument(
        "--resume-mixed",
        action="store_true",
        help="as --resume, and keep captions that were made with other settings, too (another --prompt, for example)",
    )
    existing.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    beside = group.add_mutually_exclusive_group()
    beside.add_argument(
        "--sidecar", choices=KINDS, help="write each caption into a file beside its image, such as a.txt for a.png"
    )
    beside.add_argument(
        "--metadata",
        choices=["xmp"],
        help="write each caption into its image file (JPEG, PNG, WebP), whose pixels stay as they are",
    )
    group.add_argument("--sidecar-dir", metavar="DIR", help="write sidecars below DIR, in folders like the images'")
    group.add_argument(
        "--sidecar-name",
        choices=NAMES,
        help="stem: a.txt for a.png; full: a.png.txt, so that a.png and a.jpg have their own (default: stem)",
    )
    group.add_argument(
        "--on-existing",
        choices=ON_EXISTING,
        help="what to do where an image has a sidecar, or a description in its metadata (default: error)",
    )
    group.add_argument(
        "--separator",
        metavar="TEXT",
        help="between the existing and the new caption of --on-existing append and prepend (default: ', ')",
    )
    group.add_argument(
        "--dry-run", action="store_true", help="print what would be captioned and where it would be written, and end"
    )


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of what is written."""
    group = parser.add_argument_group("captions")
    asked = group.add_mutually_exclusive_group()
    asked.add_argument(
        "--prompt",
        metavar="TEXT",
        help='instruction to a model that was trained to follow it, such as "as tags" (`vlv info` lists them); other '
        "words are the beginning of the captions. {name}, {folder}, {caption} and {tags} are the image's file name, "
        "its folder, and the caption and tags that lie beside it",
    )
    asked.add_argument(
        "--length", choices=LENGTHS, help="the model's instruction for captions of that length, if it has one"
    )
    group.add_argument("--prefix", default="", metavar="TEXT", help="stands before each caption")
    group.add_argument("--suffix", default="", metavar="TEXT", help="stands behind each caption")
    group.add_argument(
        "--trigger-word", default="", metavar="WORD", help="stands first in each caption that does not have it"
    )
    group.add_argument("--trim", action="store_true", help="remove an unfinished last sentence and repetitions")
    group.add_argument(
        "--loop-guard",
        action="store_true",
        help=f"cut a caption that repeats words over and over ({MIN_REPEATS} times, {MIN_LOOP_WORDS} words or more) "
        "after their first pass; without it the summary counts such captions",
    )
