"""What tells one model from another: the commit of a repository, or the content of a folder's files."""

import hashlib
import os
from pathlib import Path

from huggingface_hub import try_to_load_from_cache


def fingerprint(source: str | os.PathLike, revision: str | None = None) -> str:
    """The commit of a Hub repository whose files are in the cache, or the SHA-256 of a folder's weights and settings.

    The same weights in two folders have the same fingerprint.

    Args:
        source: A folder, or a repo id of which files have been downloaded.
    """
    folder = Path(source)
    if not folder.is_dir():
        for name in ("config.json", "model_index.json"):
            cached = try_to_load_from_cache(os.fspath(source), name, revision=revision)
            if isinstance(cached, str):
                return Path(cached).parent.name
        return "unknown"
    if folder.parent.name == "snapshots":  # of huggingface_hub's cache
        return folder.name
    digest = hashlib.sha256()
    weights = [path for path in folder.glob("**/*.safetensors") if not _is_of_a_checkpoint(path.relative_to(folder))]
    for path in sorted(
        [*weights, *folder.glob("*.bin"), *folder.glob("config.json"), *folder.glob("model_index.json")]
    ):
        with open(path, "rb") as file:
            digest.update(path.relative_to(folder).as_posix().encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _is_of_a_checkpoint(path: Path) -> bool:
    return path.parts[0].startswith("checkpoint-")
