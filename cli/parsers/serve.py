"""The options of `vlv serve`."""

import argparse
from typing import Any

from .common import add_model_arguments, positive

API_KEY_VARIABLE = "VLV_API_KEY"


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "serve",
        help="answer OpenAI's API: captions, caption embeddings and reconstructions over HTTP",
        description="Answers the API of OpenAI on this machine: /v1/chat/completions captions images (data URIs or "
        "http(s) URLs), /v1/embeddings gives their caption embeddings, /v1/images/variations reconstructs them, "
        "/v1/models names the model. Concurrent requests are computed in batches. SIGTERM and Ctrl-C end it after "
        "the requests that it has (docs/serving.md).",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one (default: 8000)")
    parser.add_argument("--name", help="the model's name in requests (default: repo id or name of the folder)")
    parser.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        help=f"a key of which requests need one; may be given several times (default: ${API_KEY_VARIABLE}, else none)",
    )
    parser.add_argument(
        "--no-variations", action="store_true", help="do not load the text-to-image model; saves its memory"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=300, help="most tokens where a request does not say (default: 300)"
    )
    parser.add_argument(
        "--unknown-text",
        choices=("read", "ignore", "refuse"),
        default="read",
        help="what becomes of words that the model was not trained to follow, such as 'Describe this image' of many "
        "programs: they are read as the beginning of the caption, ignored, or refused (default: read, as by vlv "
        "caption --prompt)",
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-tokens", type=positive, default=1024, help="most tokens, whatever a request says (default: 1024)"
    )
    limits.add_argument("--max-batch", type=positive, default=16, help="most captions of a batch (default: 16)")
    limits.add_argument(
        "--max-waiting", type=positive, default=512, help="most requests that wait; others get 429 (default: 512)"
    )
    limits.add_argument("--timeout", type=_seconds, default=300.0, help="longest request in seconds (default: 300)")
    limits.add_argument("--max-body-mb", type=_megabytes, default=64.0, help="largest request, in MiB (default: 64)")
    limits.add_argument("--max-image-mb", type=_megabytes, default=20.0, help="largest image, in MiB (default: 20)")
    limits.add_argument(
        "--max-pixels", type=positive, default=50_000_000, help="most pixels of an image (default: 50,000,000)"
    )
    urls = limits.add_mutually_exclusive_group()
    urls.add_argument("--no-urls", action="store_true", help="take data URIs alone")
    urls.add_argument(
        "--allow-private-urls",
        action="store_true",
        help="also fetch images from this machine and its private network; anybody who can send requests can then "
        "make this machine send requests there",
    )
    add_model_arguments(parser)
    parser.set_defaults(run="serve:run")


def _seconds(text: str) -> float:
    return _number_above_zero(text, "a number of seconds")


def _megabytes(text: str) -> float:
    return _number_above_zero(text, "a number of MiB")


def _number_above_zero(text: str, what: str) -> Any:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what} above 0")
    return value
