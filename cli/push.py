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
from vlv.errors import UserError

from .models import DTYPES, loading


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
