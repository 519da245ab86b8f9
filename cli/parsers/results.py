"""The options of `vlv evaluate compare`, `report` and `metric`."""

import argparse
from pathlib import Path
from typing import Any

from .common import DTYPE_NAMES, not_negative, not_negative_number, positive, positive_number
from .references import add_reference_arguments


def add_compare_parser(subjects: Any) -> None:
    """Adds the command to those of `vlv evaluate`."""
    parser = subjects.add_parser(
        "compare",
        help="several captioners on the same images",
        description="Captions the same images with several captioners, each in a process of its own, and compares "
        "speed, memory and captions: figures with intervals, paired differences, and the captions side by side. A "
        "captioner that fails is named, the others go on, and the exit code is 1. The same command goes on with a run "
        "that was ended. docs/evaluation.md shows the results.",
    )
    parser.add_argument(
        "captioners",
        nargs="+",
        metavar="CAPTIONER",
        help='folder or Hub repo id of a VLV or of a model that `pipeline("image-text-to-text")` loads, an endpoint '
        "https://host/v1#model, or a JSON file of captions",
    )
    parser.add_argument("--images", required=True, metavar="DIR", help="folder of the images")
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="folder of the captions and results")
    parser.add_argument(
        "--names", nargs="+", metavar="NAME", help="of the captioners, in results (default: short ones)"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="images to take, from the beginning")
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="[NAME=]TEXT",
        help="what captioners are asked: the one of this name, or without a name all others; may be given several "
        "times (default: each one's own)",
    )
    parser.add_argument("--max-new-tokens", type=positive, default=300, help="most tokens of a caption (default: 300)")
    parser.add_argument("--batch-size", type=positive, default=8, help="images in a batch (default: 8)")
    parser.add_argument("--device", help="such as cpu, cuda or mps (default: cuda or mps if available, else cpu)")
    parser.add_argument(
        "--dtype", choices=DTYPE_NAMES, default="float32", help="precision of models (default: float32)"
    )
    _add_endpoint_arguments(parser)
    add_reference_arguments(parser)
    parser.add_argument(
        "--score-model",
        metavar="DIR_OR_REPO",
        help="a VLV whose text-to-image model computes the diffusion score of all captions (`vlv score`)",
    )
    parser.add_argument(
        "--bootstrap",
        type=not_negative,
        default=1000,
        metavar="N",
        help="resamplings of the images for the 95%% intervals, 0 for none (default: 1000)",
    )
    parser.set_defaults(run="evaluate_compare:run")


def _add_endpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """The settings of endpoints, which are those of `evaluation.endpoint.EndpointOptions`."""
    parser.add_argument(
        "--key-variable",
        action="append",
        default=[],
        metavar="[NAME=]VARIABLE",
        help="environment variable with the key of the endpoint of this name; without a name, with that of OpenAI's "
        "host or of the only endpoint; may be given several times (default: OPENAI_API_KEY for OpenAI's host, no key "
        "for others)",
    )
    parser.add_argument("--concurrency", type=positive, default=8, help="requests at once to an endpoint (default: 8)")
    parser.add_argument(
        "--timeout", type=positive_number, default=120.0, help="longest request to an endpoint, in s (default: 120)"
    )
    parser.add_argument(
        "--max-retries", type=not_negative, default=5, help="repeats after 429, 500 and lost connections (default: 5)"
    )
    parser.add_argument(
        "--temperature", type=not_negative_number, default=0.0, help="of sampling, at an endpoint (default: 0)"
    )
    parser.add_argument(
        "--price-in", type=not_negative_number, default=0.0, help="price of a million tokens of requests"
    )
    parser.add_argument(
        "--price-out", type=not_negative_number, default=0.0, help="price of a million tokens of answers"
    )
    parser.add_argument(
        "--max-price",
        type=positive_number,
        help="what each endpoint may cost in all runs of --output-dir; a run stops before it",
    )


def add_report_parser(subjects: Any) -> None:
    """Adds the command to those of `vlv evaluate`."""
    parser = subjects.add_parser(
        "report",
        help="one HTML page of the results of the other commands",
        description="Writes one HTML page of the results of the other commands of `vlv evaluate` and of `vlv score`: "
        "tables with intervals, charts, the best and the worst images, settings and versions. The page holds its "
        "images and loads nothing from elsewhere.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="files of results, or folders of runs")
    parser.add_argument("--output", default="report.html", help="the HTML file (default: report.html)")
    parser.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    parser.add_argument("--title", default="Evaluation", help="title of the page (default: Evaluation)")
    parser.add_argument(
        "--images", metavar="DIR", help="folder of the evaluated images, where the results do not name it"
    )
    parser.add_argument("--captions", metavar="FILE", help="the captions that `vlv score` scored")
    parser.add_argument(
        "--rank-by", metavar="KEY", help="figure that best and worst images are chosen by, such as cosine or cider_d"
    )
    parser.add_argument(
        "--cases", type=positive, default=8, help="best images that are shown, and as many worst (default: 8)"
    )
    parser.set_defaults(run="evaluate_report:run")


def add_metric_parser(subjects: Any) -> None:
    """Adds the command to those of `vlv evaluate`."""
    parser = subjects.add_parser(
        "metric",
        help="write or push a metric as a Space, for the library evaluate",
        description="Writes or pushes the Space of a metric: its script, a page that computes it, its card and its "
        'requirements. `evaluate.load("ORG/NAME")` then loads it anywhere. Without an option, lists the metrics.',
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="of the metric, such as cider_d")
    parser.add_argument("--write-space", metavar="DIR", help="write the Space's files into this new folder")
    parser.add_argument("--push-space", metavar="ORG/NAME", help="create or update this Space on the Hub")
    parser.add_argument("--private", action="store_true", help="create the Space as a private one")
    parser.add_argument("--token", help="Hub token; by default HF_TOKEN or the one that `hf auth login` stored")
    parser.set_defaults(run="evaluate_metric:run")
