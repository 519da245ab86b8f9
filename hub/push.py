"""A model to the Hub: what `vlv push` does."""

import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError

from vlv.files import stored_dtype

from .card import change_card, is_as_pushed, stamp, write_card
from .export import export
from .folders import new_folder
from .layout import CARD, ENCODER_FILE, OWNED, PICKLES, TRAINING_FILE
from .load import (
    has_two_encoders,
    load_captioner,
    load_diffusion_components,
    load_encoder,
    read_config,
    resolve,
)

logger = logging.getLogger(__name__)


def push(
    source: str | os.PathLike,
    repo: str,
    *,
    diffusion_model: str | os.PathLike | None = None,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    dtype: torch.dtype | None = None,
    half_variant: bool = False,
    message: str | None = None,
    replace_card: bool = False,
    **card: Any,
) -> str:
    """Exports a model in the Hub's layout, with code and card, and uploads it.

    A broken upload goes on where it was when this is called again, and what the repository already holds is not sent
    again.

    Args:
        source: A folder in the Hub's layout, a checkpoint of stage 1 or 2, or a repo id.
        repo: Where to, as `org/name`; created if need be.
        diffusion_model: A diffusers folder or repo id with the text-to-image model. Not needed where `source` has one.
        private: Whether a repository that is created is private.
        revision: A branch; created if need be.
        token: Of an account that may write to `org`; by default the one that `hf auth login` stored.
        dtype: What the weights are stored in; by default as they are in `source`.
        half_variant: Stores them in half precision, too, for `variant="fp16"`.
        replace_card: Whether a model card that was edited on the Hub gives way; otherwise it is kept, which is said.
        card: For the model card, over what the checkpoint says of itself: `results`, `results_command`, `license`.
            In a card that is there already nothing else is changed.

    Returns:
        The address of the commit.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If it is no VLV, or holds pickles.
    """
    read_config(resolve(source, token=token))
    create(repo, private=private, revision=revision, token=token)
    with tempfile.TemporaryDirectory(prefix="vlv-push-") as folder:
        write_repository(
            source,
            folder,
            diffusion_model=diffusion_model,
            token=token,
            dtype=dtype,
            half_variant=half_variant,
            repo=repo,
            **card,
        )
        return upload(folder, repo, revision=revision, token=token, message=message, replace_card=replace_card, **card)


def create(repo: str, *, private: bool = False, revision: str | None = None, token: str | None = None) -> None:
    """Creates the repository and the branch `revision` where they are missing, as `push` does.

    Raises:
        ValueError: If it is to be private, and there is a public one of this name.
    """
    api = HfApi(token=token)
    api.create_repo(repo, private=private, exist_ok=True)
    if private and not api.repo_info(repo).private:
        raise ValueError(
            f"{repo} exists and is public; nothing was uploaded. Make it private first, or push elsewhere"
        )
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)


def upload(
    folder: str | os.PathLike,
    repo: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    message: str | None = None,
    replace_card: bool = False,
    **card: Any,
) -> str:
    """Uploads what `write_repository` wrote into a repository that is there, as `push` does; returns the commit's address."""
    _settle_card(Path(folder) / CARD, repo, revision, token, replace_card, card)
    commit = HfApi(token=token).upload_folder(
        repo_id=repo,
        folder_path=Path(folder),
        revision=revision,
        commit_message=message or "Upload VLV",
        ignore_patterns=PICKLES,
        delete_patterns=OWNED,  # what an earlier push left and this one does not have
    )
    return str(commit.commit_url)


def _settle_card(
    path: Path, repo: str, revision: str | None, token: str | None, replace: bool, changes: dict[str, Any]
) -> None:
    """Puts the card that is to be on the Hub into `path`: a new one, or the Hub's own if somebody edited that."""
    ours = stamp(path.read_text(encoding="utf-8"))
    try:
        theirs = Path(HfApi(token=token).hf_hub_download(repo, CARD, revision=revision)).read_text(encoding="utf-8")
    except EntryNotFoundError:
        theirs = None
    if theirs is None or replace or theirs == ours or is_as_pushed(theirs):
        path.write_text(ours, encoding="utf-8")
        return
    logger.warning(
        "%s has a model card that was edited there: it is kept%s. replace_card (--replace-card) writes it anew",
        repo,
        ", but for " + " and ".join(c for c in changes if c != "results_command") if changes else "",
    )
    path.write_text(change_card(theirs, repo.split("/")[-1], **changes) if changes else theirs, encoding="utf-8")


def write_repository(
    source: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    diffusion_model: str | os.PathLike | None = None,
    token: str | None = None,
    dtype: torch.dtype | None = None,
    half_variant: bool = False,
    repo: str = "org/name",
    **card: Any,
) -> Path:
    """Writes what `push` uploads: the model in the Hub's layout, its code, its card.

    In a card that the model has already nothing is changed but what `card` gives.
    """
    root = resolve(source, token=token)
    read_config(root)
    here, there = root.resolve(), Path(folder).resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ValueError(f"{folder} is, holds, or lies in the model that would be read; write to another folder")
    with new_folder(folder) as written:
        _write_repository(root, written, diffusion_model, token, dtype, half_variant, repo, card)
    return Path(folder)


def _write_repository(
    root: Path,
    folder: Path,
    diffusion_model: str | os.PathLike | None,
    token: str | None,
    dtype: torch.dtype | None,
    half_variant: bool,
    repo: str,
    card: dict[str, Any],
) -> None:
    if diffusion_model is None and ((root / "unet").is_dir() or (root / "model_index.json").is_file()):
        diffusion_model = root  # if half of it is missing, loading says so
    apart = (root / ENCODER_FILE).is_file()  # else a trainer's output
    own = dtype or stored_dtype(root / "encoder" if apart else root)
    parts = (
        load_diffusion_components(diffusion_model, token=token, dtype=dtype) if diffusion_model is not None else None
    )
    if read_config(root).get("text_config") is not None:
        words = dtype or stored_dtype(root)
        model, processor = load_captioner(root, dtype=words)
        first = load_encoder(root, dtype=own)[0] if apart and (own != words or has_two_encoders(root)) else None
        export(
            folder,
            encoder=first,
            captioner=model,
            processor=processor,
            diffusion_model=parts,
            half_variant=half_variant,
        )
    else:
        encoder, image_processor = load_encoder(root, dtype=own)
        export(
            folder, encoder=encoder, image_processor=image_processor, diffusion_model=parts, half_variant=half_variant
        )
    if (root / TRAINING_FILE).is_file():
        shutil.copyfile(root / TRAINING_FILE, folder / TRAINING_FILE)
    if (root / CARD).is_file():
        text = (root / CARD).read_text(encoding="utf-8")
        (folder / CARD).write_text(change_card(text, repo.split("/")[-1], **card) if card else text, encoding="utf-8")
    else:
        write_card(folder, repo, **card)
