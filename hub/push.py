"""Pushes a model to the Hub: what `vlv push` does."""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, HTTPError

from vlv.files import read_json, stored_dtype, write_json

from .card import DIFFUSION_LABELS, Card, change_card, is_as_pushed, stamp, without_local_paths, write_card
from .compatibility import check_compatible
from .decoder import DiffusionModel, find_diffusion_model, referred_diffusion_model
from .export import export
from .folders import new_folder
from .layout import CARD_FILE, ENCODER_FILE, MODEL_INDEX_FILE, OWNED, PICKLES, TRAINING_FILE
from .load import (
    has_two_encoders,
    load_captioner,
    load_diffusion_components,
    load_encoder,
    read_config,
    resolve,
)
from .modular import add_modular_files

logger = logging.getLogger(__name__)


class UploadError(Exception):
    """The Hub refused a repository or an upload, or did not answer. The message says what to do."""


@contextmanager
def upload_errors(repo: str) -> Iterator[None]:
    """Turns any error of an upload to `repo` into an `UploadError`."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # huggingface_hub raises all of these
        raise UploadError(_explain(repo, error)) from error


def _explain(repo: str, error: BaseException) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, ValueError) and status is None:
        return str(error)
    if status == 401:
        return f"the Hub wants a token to write to {repo}; run `hf auth login`, or set HF_TOKEN or --token"
    if status == 403:
        return f"this token may not write to {repo}; check the organisation and the token's write permission"
    return f"{repo}: {error}\nuploaded files are kept; run the same command again to continue"


def push(
    source: str | os.PathLike,
    repo: str,
    *,
    diffusion_model: str | os.PathLike | None = None,
    by_reference: bool = False,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    dtype: torch.dtype | None = None,
    half_variant: bool = False,
    message: str | None = None,
    card: Card | None = None,
    replace_card: bool = False,
) -> str:
    """Exports a model in the Hub layout, with code and card, and uploads it.

    The repository is created, or write access checked, before the model is exported. After a broken upload the same
    call continues it. Files that the repository has already are not sent again.

    Args:
        source: A folder in the Hub layout, a stage-1 or stage-2 checkpoint, or a repo id.
        repo: The repository, as `org/name`. It is created if it does not exist.
        diffusion_model: Diffusers folder or repo id of the text-to-image model. Not needed where `source` has one.
        by_reference: Whether the repository refers to the text-to-image model, which then has to be on the Hub, in
            place of holding a copy.
        private: Whether a new repository is private.
        revision: A branch. It is created if it does not exist.
        token: Of an account that may write to `org`; by default the one that `hf auth login` stored.
        dtype: Precision of the stored weights; by default as in `source`.
        half_variant: Also stores the weights in half precision, for `variant="fp16"`.
        message: Of the commit.
        card: Results and licence for the model card. In a card that exists nothing else changes.
        replace_card: Whether to write a new card in place of one that was edited on the Hub. By default the edited
            card is kept, with a warning.

    Returns:
        The URL of the commit.

    Raises:
        FileNotFoundError: If there is no model at `source`.
        ValueError: If it is not a VLV model, or holds pickles, or `diffusion_model` does not fit it
            (`check_compatible`), or is not a repository that can be referred to.
        UploadError: If the Hub refuses the repository or the upload, or does not answer.
    """
    card = card or Card()
    root = resolve(source, token=token)
    read_config(root)
    if by_reference:
        _reference(root, source, diffusion_model, token)
    with upload_errors(repo):
        _create_repository(repo, private, revision, token)
    with tempfile.TemporaryDirectory(prefix="vlv-push-") as folder:
        write_repository(
            source,
            folder,
            diffusion_model=diffusion_model,
            by_reference=by_reference,
            token=token,
            dtype=dtype,
            half_variant=half_variant,
            repo=repo,
            card=card,
        )
        with upload_errors(repo):
            _settle_card(Path(folder) / CARD_FILE, repo, revision, token, card, replace_card)
            return _upload(Path(folder), repo, revision, token, message)


def _create_repository(repo: str, private: bool, revision: str | None, token: str | None) -> None:
    """Creates the repository and the branch where they do not exist. A public one does not become private."""
    api = HfApi(token=token)
    api.create_repo(repo, private=private, exist_ok=True)
    if private and not api.repo_info(repo).private:
        raise ValueError(f"{repo} exists and is public; nothing was uploaded. Make it private, or push to another one")
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)


def _upload(folder: Path, repo: str, revision: str | None, token: str | None, message: str | None) -> str:
    commit = HfApi(token=token).upload_folder(
        repo_id=repo,
        folder_path=folder,
        revision=revision,
        commit_message=message or "Upload VLV",
        ignore_patterns=PICKLES,
        delete_patterns=OWNED,  # files of an earlier push that this one does not have
    )
    return str(commit.commit_url)


def _settle_card(path: Path, repo: str, revision: str | None, token: str | None, card: Card, replace: bool) -> None:
    """Writes the card to upload into `path`: the new one, or the Hub's if that was edited there."""
    new = stamp(path.read_text(encoding="utf-8"))
    try:
        old = Path(HfApi(token=token).hf_hub_download(repo, CARD_FILE, revision=revision)).read_text(encoding="utf-8")
    except EntryNotFoundError:
        old = None
    if old is None or replace or old == new or is_as_pushed(old):
        path.write_text(new, encoding="utf-8")
        return
    logger.warning(
        "the model card of %s was edited on the Hub and is kept%s; replace_card (--replace-card) writes a new one",
        repo,
        f", with the new {' and '.join(card.changes)}" if card.changes else "",
    )
    path.write_text(change_card(old, repo, card) if card.changes else old, encoding="utf-8")


def write_repository(
    source: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    diffusion_model: str | os.PathLike | None = None,
    by_reference: bool = False,
    token: str | None = None,
    dtype: torch.dtype | None = None,
    half_variant: bool = False,
    repo: str = "org/name",
    card: Card | None = None,
) -> Path:
    """Writes what `push` uploads into a new folder: the model in the Hub layout, its code and its card.

    Args and errors are those of `push`. `repo` is the name that the card's examples load.

    Returns:
        `folder`.

    Raises:
        ValueError: If `folder` is not new or empty, or overlaps with `source`.
    """
    root = resolve(source, token=token)
    read_config(root)
    model_folder, target = root.resolve(), Path(folder).resolve()
    if model_folder == target or model_folder in target.parents or target in model_folder.parents:
        raise ValueError(f"{folder} overlaps with the model's own folder {source}; write to another folder")
    with new_folder(folder) as written:
        reference = _reference(root, source, diffusion_model, token) if by_reference else None
        _export_again(root, source, written, diffusion_model, reference, token, dtype, half_variant)
        add_modular_files(written, repo, token)
        if (root / TRAINING_FILE).is_file():
            write_json(written / TRAINING_FILE, without_local_paths(read_json(root / TRAINING_FILE)))
        _write_card(root, written, repo, card or Card())
    return Path(folder)


def _export_again(
    root: Path,
    source: str | os.PathLike,
    folder: Path,
    diffusion_model: str | os.PathLike | None,
    reference: DiffusionModel | None,
    token: str | None,
    dtype: torch.dtype | None,
    half_variant: bool,
) -> None:
    """Loads every part of the model in `root` in its stored precision and exports it into `folder`.

    Args:
        source: Its name, for messages.
        reference: The text-to-image model that the export refers to in place of holding a copy.
    """
    own = root if any((root / name).exists() for name in (MODEL_INDEX_FILE, *DIFFUSION_LABELS)) else None
    components = None
    if (read_from := diffusion_model or own) is not None:  # loading names a missing part
        components = load_diffusion_components(read_from, token=token, dtype=dtype)
    in_hub_layout = (root / ENCODER_FILE).is_file()  # a trainer's output has one file of weights at the root
    encoder_dtype = dtype or stored_dtype(root / "encoder" if in_hub_layout else root)
    parts: dict[str, Any] = {}
    if read_config(root).get("text_config") is None:
        encoder, parts["image_processor"] = load_encoder(root, dtype=encoder_dtype)
        parts["encoder"] = encoder
    else:
        captioner_dtype = dtype or stored_dtype(root)
        parts["captioner"], parts["processor"] = load_captioner(root, dtype=captioner_dtype)
        encoder = parts["captioner"].model
        if in_hub_layout and (encoder_dtype != captioner_dtype or has_two_encoders(root)):
            encoder = parts["encoder"] = load_encoder(root, dtype=encoder_dtype)[0]
    if diffusion_model is not None and components is not None:
        check_compatible(encoder, components, os.fspath(source), diffusion_model, token=token)
    export(folder, **parts, diffusion_model=reference or components, half_variant=half_variant)


def _reference(
    root: Path, source: str | os.PathLike, diffusion_model: str | os.PathLike | None, token: str | None
) -> DiffusionModel:
    """The repository of a text-to-image model, at its present commit: `diffusion_model`, or what `root` refers to.

    Raises:
        FileNotFoundError: If the repository could not be loaded.
        ValueError: If it is a folder, or neither names one.
    """
    read_from = diffusion_model
    if read_from is None and (referred := referred_diffusion_model(root)) is not None:
        if referred.revision is not None:
            return referred
        read_from = referred.source
    if read_from is None or Path(read_from).is_dir() or os.path.isabs(read_from):
        found = f"{source} holds a copy" if read_from is None else f"{read_from} is a folder"
        raise ValueError(
            f"by_reference (--by-reference) needs a text-to-image model that is a repository of the Hub, and {found}; "
            "name one with diffusion_model (--diffusion-model ORG/NAME), or push without by_reference, which copies it"
        )
    folder = resolve(read_from, token=token, allow_patterns=[MODEL_INDEX_FILE], pickles_allowed=True)
    return referred_diffusion_model(folder) or find_diffusion_model(read_from)


def _write_card(root: Path, folder: Path, repo: str, card: Card) -> None:
    """The model's own card with the changes of `card`, or a new one if the model has none."""
    if not (root / CARD_FILE).is_file():
        write_card(folder, repo, card)
        return
    text = (root / CARD_FILE).read_text(encoding="utf-8")
    (folder / CARD_FILE).write_text(change_card(text, repo, card) if card.changes else text, encoding="utf-8")
