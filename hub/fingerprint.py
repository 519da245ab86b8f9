"""What tells one model from another: the commit of a repository, or the content of a folder's files."""

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import filter_repo_objects

from .layout import TRAINER_FOLDERS, TRAINING_FILE

# Files in the folder of a model that change nothing in what it computes.
IGNORED = [
    TRAINING_FILE,
    "evaluation.json",
    "trainer_state.json",
    "run.json",
    "census.json",
    "samples/*",
    *(f"{name}*" for name in TRAINER_FOLDERS),
]
UNKNOWN = "unknown"
WEIGHTS_AND_SETTINGS = ("*.safetensors", "*.bin", "*.json", "*.jinja")


def fingerprint(source: str | os.PathLike, patterns: Sequence[str] = WEIGHTS_AND_SETTINGS) -> str:
    """The commit of a Hub repository whose files are in the cache, or the SHA-256 of a folder's weights and settings.

    The same weights and settings in two folders have the same fingerprint.

    Args:
        source: A folder, a file (whose content counts), or a repo id of which files have been downloaded.
        patterns: The files of a folder that count, as in `snapshot_download`. Training checkpoints and the records of
            trainings and evaluations never count.
    """
    folder = Path(source)
    if folder.is_file():
        with open(folder, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not folder.is_dir():
        with suppress(HFValidationError):  # not a repo id
            for name in ("config.json", "model_index.json"):
                cached = try_to_load_from_cache(os.fspath(source), name)
                if isinstance(cached, str):
                    return Path(cached).parent.name
        return UNKNOWN
    if folder.parent.name == "snapshots":  # of huggingface_hub's cache
        return folder.name
    digest = hashlib.sha256()
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for name in filter_repo_objects(names, allow_patterns=list(patterns), ignore_patterns=IGNORED):
        with open(folder / name, "rb") as file:
            digest.update(name.encode("utf-8", "surrogateescape") + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
