"""`vlv push`: a model to the Hub."""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from vlv import hub

from .errors import UserError
from .models import DTYPES, loading


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "push",
        help="upload a model to the Hugging Face Hub",
        description="Uploads a model as one repository that transformers and diffusers both load: captioner, encoder, "
        "text-to-image model, their code, and a model card. After a broken upload the same command continues it. "
        "`--output` writes the same files into a folder and uploads nothing.",
    )
    parser.add_argument("source", metavar="SRC", help="folder of a model, stage-1 or stage-2 checkpoint, or repo id")
    parser.add_argument("repo", metavar="ORG/NAME", help="the repository; created if it does not exist")
    parser.add_argument(
        "--diffusion-model", metavar="DIR_OR_REPO", help="the text-to-image model, if SRC does not hold one"
    )
    parser.add_argument(
        "--by-reference",
        action="store_true",
        help="leave the text-to-image model in its own repository of the Hub, which the uploaded one names with its "
        "commit, in place of copying it",
    )
    parser.add_argument("--private", action="store_true", help="create the repository as a private one")
    parser.add_argument("--revision", help="branch to upload to; created if it does not exist (default: main)")
    parser.add_argument("--token", help="Hub token; by default HF_TOKEN or the one that `hf auth login` stored")
    parser.add_argument("--dtype", choices=DTYPES, help="store the weights in this precision (default: as in SRC)")
    parser.add_argument(
        "--half-variant", action="store_true", help='also store the weights in half precision, for variant="fp16"'
    )
    parser.add_argument("--message", help="commit message")
    parser.add_argument(
        "--results",
        metavar="FILE",
        help="JSON with metrics for the card, as `vlv evaluate` writes it: {subject: {metric: value}}",
    )
    parser.add_argument("--results-command", metavar="TEXT", help="the command that printed the metrics")
    parser.add_argument("--license", help="licence identifier of the Hub for the repository")
    parser.add_argument(
        "--replace-card",
        action="store_true",
        help="write a new model card even if the card was edited on the Hub (by default the edited card is kept, and "
        "only --results and --license change it)",
    )
    parser.add_argument("--output", metavar="DIR", help="write the repository into this folder and upload nothing")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    check_repo_id(arguments.repo)
    shared: dict[str, Any] = {
        "diffusion_model": arguments.diffusion_model,
        "by_reference": arguments.by_reference,
        "token": arguments.token,
        "dtype": DTYPES[arguments.dtype] if arguments.dtype else None,
        "half_variant": arguments.half_variant,
        "card": _card(arguments),
    }
    if arguments.output:
        with loading(arguments.source):
            hub.write_repository(arguments.source, arguments.output, repo=arguments.repo, **shared)
        print(f"written to {arguments.output}")
        return 0
    try:
        with loading(arguments.source):
            url = hub.push(
                arguments.source,
                arguments.repo,
                private=arguments.private,
                revision=arguments.revision,
                message=arguments.message,
                replace_card=arguments.replace_card,
                **shared,
            )
    except hub.UploadError as error:
        raise UserError(str(error)) from error
    print(f"pushed: {url}")
    return 0


@contextmanager
def talking_to_the_hub(repo: str) -> Iterator[None]:
    """Turns errors of an upload to `repo` into a `UserError` of one line."""
    try:
        with hub.upload_errors(repo):
            yield
    except hub.UploadError as error:
        raise UserError(str(error)) from error


def check_repo_id(repo: str) -> None:
    """Raises `UserError` unless `repo` has the form org/name."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{repo} is not a repo id; expected org/name: {error}") from error
    if repo.count("/") != 1:
        raise UserError(f"{repo} is not a repo id; expected org/name")


def _card(arguments: argparse.Namespace) -> hub.Card:
    """The card of the options `--results`, `--results-command` and `--license`."""
    if not arguments.results:
        return hub.Card(license=arguments.license)
    try:
        results = json.loads(Path(arguments.results).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--results {arguments.results} could not be read as JSON: {error}") from error
    try:
        return hub.Card(results, arguments.results_command or "", arguments.license)
    except ValueError as error:
        raise UserError(f"--results {arguments.results}: {error}") from error
