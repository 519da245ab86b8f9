"""`vlv push`: a model to the Hub."""

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from httpx import HTTPError
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from vlv import hub

from .errors import UserError
from .models import DTYPES, loading

NETWORK_ERRORS: tuple[type[BaseException], ...] = (HTTPError, OSError, RuntimeError, ValueError)


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "push",
        help="upload a model to the Hugging Face Hub",
        description="Uploads a model as one repository that transformers and diffusers both load: captioner, encoder, "
        "text-to-image model, their code, and a model card. Run again after a broken upload, it goes on where it was. "
        "`--output` writes the same files into a folder and uploads nothing.",
    )
    parser.add_argument("source", metavar="SRC", help="folder of a model, checkpoint of stage 1 or 2, or repo id")
    parser.add_argument("repo", metavar="ORG/NAME", help="the repository; created if need be")
    parser.add_argument(
        "--diffusion-model", metavar="DIR_OR_REPO", help="the text-to-image model, if SRC does not hold one already"
    )
    parser.add_argument("--private", action="store_true", help="create the repository as a private one")
    parser.add_argument("--revision", help="a branch to upload to; created if need be (default: main)")
    parser.add_argument("--token", help="of the Hub; by default HF_TOKEN or the one that `hf auth login` stored")
    parser.add_argument("--dtype", choices=DTYPES, help="store the weights in this precision (default: as they are)")
    parser.add_argument(
        "--half-variant", action="store_true", help='store the weights in half precision, too, for variant="fp16"'
    )
    parser.add_argument("--message", help="of the commit")
    parser.add_argument(
        "--results",
        metavar="FILE",
        help="figures for the card, as `vlv evaluate` writes them: {subject: {name: value}}",
    )
    parser.add_argument("--results-command", metavar="TEXT", help="the command that printed them")
    parser.add_argument("--license", help="of the repository, as the Hub names licences")
    parser.add_argument(
        "--replace-card",
        action="store_true",
        help="write the model card anew even if it was edited on the Hub (otherwise that one is kept, and only what "
        "--results and --license give is changed in it)",
    )
    parser.add_argument("--output", metavar="DIR", help="write the repository here instead of uploading it")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    check_repo_id(arguments.repo)
    card = _card(arguments)
    shared: dict[str, Any] = {"diffusion_model": arguments.diffusion_model, "token": arguments.token, **card}
    shared["half_variant"] = arguments.half_variant
    shared["dtype"] = DTYPES[arguments.dtype] if arguments.dtype else None
    if arguments.output:
        with loading(arguments.source):
            hub.write_repository(arguments.source, arguments.output, repo=arguments.repo, **shared)
        print(f"written to {arguments.output}")
        return 0
    place = {"revision": arguments.revision, "token": arguments.token}
    with loading(arguments.source):
        hub.read_config(hub.resolve(arguments.source, token=arguments.token))
    with talking_to_the_hub(arguments.repo):
        hub.create(arguments.repo, private=arguments.private, **place)
    with tempfile.TemporaryDirectory(prefix="vlv-push-") as folder:
        with loading(arguments.source):
            hub.write_repository(arguments.source, folder, repo=arguments.repo, **shared)
        with talking_to_the_hub(arguments.repo):
            url = hub.upload(
                folder,
                arguments.repo,
                message=arguments.message,
                replace_card=arguments.replace_card,
                **place,
                **card,
            )
    print(f"pushed: {url}")
    return 0


@contextmanager
def talking_to_the_hub(repo: str) -> Iterator[None]:
    """Says in one line what is wrong with a repository that cannot be written to."""
    try:
        yield
    except NETWORK_ERRORS as error:
        raise UserError(_explain(repo, error)) from error


def check_repo_id(repo: str) -> None:
    """Raises `UserError` unless `repo` is like org/name."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{repo} is no repository; expected org/name: {error}") from error
    if repo.count("/") != 1:
        raise UserError(f"{repo} is no repository; expected org/name")


def _card(arguments: argparse.Namespace) -> dict[str, Any]:
    card: dict[str, Any] = {"license": arguments.license} if arguments.license else {}
    if not arguments.results:
        return card
    try:
        results = json.loads(Path(arguments.results).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--results {arguments.results} cannot be read as JSON: {error}") from error
    if not isinstance(results, dict) or not all(isinstance(v, dict) for v in results.values()):
        raise UserError(f"--results {arguments.results}: expected {{subject: {{name: value}}}}")
    if not arguments.results_command:
        raise UserError("--results needs --results-command: a figure without its command is worth little")
    return card | {"results": results, "results_command": arguments.results_command}


def _explain(repo: str, error: BaseException) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, ValueError) and status is None:
        return str(error)
    if status == 401:
        return f"the Hub wants a token to write to {repo}: run `hf auth login`, or set HF_TOKEN or --token"
    if status == 403:
        return f"this token may not write to {repo}; is the organisation right, and has the token the right to write?"
    return f"{repo}: {error}\nwhat was uploaded is kept; run the same command again to go on"
