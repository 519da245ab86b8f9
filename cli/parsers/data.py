"""The options of `vlv data`."""

import argparse
from typing import Any

from .common import not_negative, not_negative_number, positive, positive_number

COLUMN_KINDS = ("url", "caption", "width", "height", "watermark", "aesthetic")


def number_or_none(text: str) -> float | None:
    """An argparse type: a number from 0 up, or `none`."""
    if text.lower() == "none":
        return None
    try:
        return not_negative_number(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a number or none, not {text}") from error


def aspect_ratios(text: str) -> tuple[float, float] | None:
    """An argparse type: two numbers from 0 up, such as `0.5:2`, or `none`."""
    if text.lower() == "none":
        return None
    try:
        lowest, highest = map(not_negative_number, text.split(":"))
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise argparse.ArgumentTypeError(f"must be two numbers, such as 0.5:2, or none, not {text}") from error
    return lowest, highest


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "data",
        help="prepare data for training: filter, download, pack, find duplicates, caption, inspect, split",
        description="Prepares data. Every step writes a manifest beside its output. The same command again goes on "
        "where it was ended, and does nothing if it is done; other inputs or options need another output or "
        "--overwrite. The exit code is 1, each time, if images cannot be read or downloaded. "
        "docs/data_preparation.md has examples.",
    )
    steps = parser.add_subparsers(title="steps", metavar="STEP", required=True)
    for add in (_add_filter, _add_download, _add_pack, _add_dedup, _add_recaption, _add_inspect, _add_split):
        add(steps)


def _add_filter(steps: Any) -> None:
    parser = steps.add_parser(
        "filter",
        help="metadata of images in parquet files, by size, watermark and aesthetic score",
        description="Keeps the rows of metadata (LAION's columns) that pass all rules. The defaults are those of the "
        "paper. Memory does not depend on the number of rows. Beside the output are OUT.report.md and "
        "OUT.report.json: counts for each rule and histograms of each column.",
    )
    parser.add_argument("files", nargs="+", metavar="METADATA.parquet", help="parquet files")
    _add_output(parser, "OUT.parquet", "the rows that pass")
    rule = {"type": number_or_none, "metavar": "X"}
    parser.add_argument(
        "--min-side", **rule, default=512, help="the shorter side is above X pixels, or none (default: 512)"
    )
    parser.add_argument(
        "--aspect-ratio",
        type=aspect_ratios,
        default=(0.5, 2.0),
        metavar="A:B",
        help="smallest and largest width / height, or none (default: 0.5:2)",
    )
    parser.add_argument(
        "--max-watermark", **rule, default=0.5, help="probability of a watermark below X, or none (default: 0.5)"
    )
    parser.add_argument(
        "--min-aesthetic", **rule, default=None, help="aesthetic score of at least X, or none (default: none)"
    )
    parser.add_argument(
        "--keep-missing", action="store_true", help="a row passes a rule whose value it lacks (default: it does not)"
    )
    parser.add_argument(
        "--sample",
        type=positive,
        metavar="N",
        help="keep N of the rows that pass, drawn by a hash: the same ones whatever the files and their order",
    )
    parser.add_argument("--seed", type=int, default=0, help="of --sample (default: 0)")
    parser.add_argument(
        "--key", metavar="COLUMN", help="column that --sample identifies rows by (default: that of the URLs)"
    )
    for kind in COLUMN_KINDS:
        parser.add_argument(
            f"--{kind}-column", metavar="NAME", help=f"column of the {kind} (default: LAION's usual names)"
        )
    parser.set_defaults(run="data:run_filter")


def _add_download(steps: Any) -> None:
    parser = steps.add_parser(
        "download",
        help="the images of metadata with URLs, by img2dataset",
        description="Downloads the images whose URLs are in parquet files, such as those of `vlv data filter`, into "
        "WebDataset shards, by img2dataset. It is ended when it hangs, and asked again for what failed; "
        "OUT/failed.parquet has the URLs without an image, and is itself metadata to download.",
    )
    parser.add_argument("files", nargs="+", metavar="METADATA.parquet", help="parquet files")
    _add_output(parser, "OUT", "the folder of shards")
    parser.add_argument("--img2dataset", metavar="PROGRAM", help="img2dataset's program (default: that on PATH)")
    parser.add_argument(
        "--image-size", type=positive, default=512, metavar="N", help="shorter side of larger images (default: 512)"
    )
    parser.add_argument(
        "--resize-mode",
        choices=("keep_ratio", "center_crop", "border", "no"),
        default="keep_ratio",
        help="of larger images, as img2dataset names it; no keeps the files as they are (default: keep_ratio)",
    )
    parser.add_argument(
        "--shard-images", type=positive, default=10_000, metavar="N", help="URLs of a shard (default: 10000)"
    )
    parser.add_argument("--processes", type=positive, default=1, help="processes (default: 1)")
    parser.add_argument("--threads", type=positive, default=32, help="downloads at once in a process (default: 32)")
    parser.add_argument(
        "--timeout", type=positive, default=10, metavar="S", help="of an image, in seconds (default: 10)"
    )
    parser.add_argument(
        "--time-limit", type=positive_number, default=86_400.0, metavar="S", help="of a pass (default: 86400)"
    )
    parser.add_argument(
        "--stall-limit",
        type=positive_number,
        default=600.0,
        metavar="S",
        help="a pass ends when nothing was written for so long (default: 600)",
    )
    parser.add_argument(
        "--passes", type=positive, default=3, help="passes over the URLs without an image (default: 3)"
    )
    for kind in COLUMN_KINDS[:2]:
        parser.add_argument(f"--{kind}-column", metavar="NAME", help=f"column of the {kind} (default: LAION's names)")
    parser.set_defaults(run="data:run_download")


def _add_pack(steps: Any) -> None:
    parser = steps.add_parser(
        "pack",
        help="images into WebDataset or parquet shards of one size",
        description="Packs images, with captions or without, into shards that the trainers read. The image files "
        "stay as they are. Images that cannot be decoded are left out and named in OUT/failed.json; the exit code is "
        "1 then.",
    )
    _add_source(parser)
    _add_output(parser, "OUT", "the folder of shards")
    parser.add_argument(
        "--captions",
        metavar="LIST.jsonl",
        help="file of `vlv data recaption` or `vlv caption` of SOURCE: pack the images that it has, with its captions",
    )
    parser.add_argument(
        "--format", choices=("webdataset", "parquet"), default="webdataset", help="of the shards (default: webdataset)"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--shard-images", type=positive, metavar="N", help="images of a shard (default: 1000)")
    size.add_argument("--shard-mb", type=positive_number, metavar="MB", help="megabytes of images of a shard")
    parser.set_defaults(run="data:run_pack")


def _add_dedup(steps: Any) -> None:
    parser = steps.add_parser(
        "dedup",
        help="near duplicates, by a perceptual hash",
        description="Finds images that look alike, by a perceptual hash of 64 bits (pHash). OUT/kept.jsonl lists the "
        "images to keep, the largest of each group, for the trainers; OUT/duplicates.json has the groups.",
    )
    _add_source(parser)
    _add_output(parser, "OUT", "the folder of the lists")
    _add_distance(parser)
    _add_workers(parser)
    parser.set_defaults(run="data:run_dedup")


def _add_recaption(steps: Any) -> None:
    parser = steps.add_parser(
        "recaption",
        help="captions of a vision model behind an OpenAI-compatible endpoint",
        description="Captions images by a teacher behind an OpenAI-compatible endpoint, as pairs for stage 2. An "
        "answer is written when it comes: an ended run pays for none twice. Refusals and malformed answers are in "
        "OUT.rejected.jsonl with their reasons. The exit code is 1 while requests have failed, which the same command "
        "asks for again, and if images cannot be read.",
    )
    _add_source(parser, pairs=False)
    _add_output(parser, "OUT.jsonl", "the list of images and captions")
    parser.add_argument("--model", required=True, help="its name at the endpoint")
    parser.add_argument(
        "--base-url", metavar="URL", help="address, such as http://127.0.0.1:8000/v1 (default: OpenAI's)"
    )
    parser.add_argument(
        "--key-variable",
        metavar="NAME",
        help="environment variable with the key (default: OPENAI_API_KEY at OpenAI, elsewhere no key)",
    )
    parser.add_argument(
        "--prompt", metavar="FILE", help="text file with the question (default: an exhaustive description)"
    )
    parser.add_argument(
        "--max-side", type=positive, default=1024, metavar="N", help="larger images are sent smaller (default: 1024)"
    )
    parser.add_argument("--max-tokens", type=positive, default=512, help="most tokens of an answer (default: 512)")
    parser.add_argument("--temperature", type=not_negative_number, default=0.0, help="of sampling (default: 0)")
    parser.add_argument("--min-words", type=positive, default=3, help="shorter answers are malformed (default: 3)")
    parser.add_argument("--concurrency", type=positive, default=8, help="requests at once (default: 8)")
    parser.add_argument(
        "--requests-per-minute", type=positive_number, metavar="N", help="start no more requests than this"
    )
    parser.add_argument(
        "--timeout", type=positive_number, default=120.0, help="of a request, in seconds (default: 120)"
    )
    parser.add_argument(
        "--max-retries",
        type=not_negative,
        default=5,
        metavar="N",
        help="repeats of a request after 429, 500 and lost connections, with growing pauses (default: 5)",
    )
    parser.add_argument(
        "--max-failures",
        type=positive,
        default=20,
        metavar="N",
        help="stop when so many requests in a row have failed, with all their repeats (default: 20)",
    )
    parser.add_argument("--passes", type=positive, default=2, help="times that failed images are asked (default: 2)")
    price = {"type": not_negative_number, "default": 0.0}
    parser.add_argument("--price-in", **price, help="price of a million tokens of requests")
    parser.add_argument("--price-out", **price, help="price of a million tokens of answers")
    parser.add_argument(
        "--max-price", type=positive_number, help="what all runs of this output may spend; a run stops before it"
    )
    parser.add_argument(
        "--estimate",
        type=positive,
        metavar="N",
        help="ask for N images, print what all would cost, and end; the answers are kept",
    )
    parser.set_defaults(run="data:run_recaption")


def _add_inspect(steps: Any) -> None:
    parser = steps.add_parser(
        "inspect",
        help="unreadable files, sizes, duplicates, lengths of captions; a page with images",
        description="Looks at every image. Writes OUT/report.json, and OUT/report.html: one page with images that "
        "needs no other file. The exit code is 1 if images cannot be read.",
    )
    _add_source(parser)
    _add_output(parser, "OUT", "the folder of the report")
    parser.add_argument(
        "--thumbnails", type=not_negative, default=48, metavar="N", help="images on the page (default: 48)"
    )
    _add_distance(parser)
    _add_workers(parser)
    parser.set_defaults(run="data:run_inspect")


def _add_split(steps: Any) -> None:
    parser = steps.add_parser(
        "split",
        help="training, validation and test lists, by a hash",
        description="Writes OUT/train.jsonl, OUT/validation.jsonl and, with --test, OUT/test.jsonl, lists that the "
        "trainers read. An image goes where the hash of its name says: images that are added later move none. Images "
        "are not opened; empty files are left out and named in OUT/failed.json.",
    )
    _add_source(parser)
    _add_output(parser, "OUT", "the folder of the lists")
    share = {"type": not_negative_number, "metavar": "SHARE"}
    parser.add_argument("--validation", **share, default=0.05, help="share of the images (default: 0.05)")
    parser.add_argument("--test", **share, default=0.0, help="share of the images (default: 0)")
    parser.add_argument(
        "--by",
        choices=("name", "content"),
        default="name",
        help="what is hashed; by content, equal files stay together",
    )
    parser.add_argument("--seed", type=int, default=0, help="other seeds split otherwise (default: 0)")
    parser.add_argument(
        "--groups", metavar="FILE", help="duplicates.json of `vlv data dedup`: near duplicates stay together"
    )
    parser.set_defaults(run="data:run_split")


def _add_source(parser: argparse.ArgumentParser, pairs: bool = True) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="folder, list, captions JSON, parquet or tar files, or a data set, as for training (docs/data.md)",
    )
    if pairs:
        parser.add_argument("--pairs", action="store_true", help="with captions, which each image needs")
        parser.add_argument("--caption-column", metavar="NAME", help="column of the captions (default: caption)")
    parser.add_argument("--image-column", metavar="NAME", help="column of the images (default: image)")
    parser.add_argument("--image-root", metavar="DIR", help="folder that paths start from (default: that of the list)")


def _add_distance(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--distance",
        type=not_negative,
        default=4,
        metavar="BITS",
        help="bits of 64 in which near duplicates differ at most, up to 8 (default: 4)",
    )


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=positive, metavar="N", help="threads that decode (default: one a core)")


def _add_output(parser: argparse.ArgumentParser, metavar: str, what: str) -> None:
    parser.add_argument("--output", required=True, metavar=metavar, help=what)
    parser.add_argument("--overwrite", action="store_true", help="replace the output of another run of this command")
