"""Images that a table names by a path: trusted in a table of one's own, bounded in a data set of the Hub."""

import os
import zipfile
from pathlib import PurePosixPath

from huggingface_hub import constants
from huggingface_hub.errors import HTTPError

from vlv.image_files import image_suffixes

from .source import EncodedImage, UnreadableImage

ARCHIVES = tuple(f"{kind}://" for kind in ("zip", "tar", "gzip", "bz2", "xz", "lz4", "zstd"))
"""How `datasets` names a file in an archive: `zip://NAME::ARCHIVE`."""
HUB = "hf://datasets/"


def resolve_path(path: str, folder: str | os.PathLike) -> str:
    """A path in a table, from a folder. A text that names no file there (base64, for example) stays as it is."""
    beside = os.path.join(folder, path)
    try:
        return beside if os.path.exists(beside) else path
    except ValueError:  # a null byte
        return path


def named_image(
    text: str, folder: str | os.PathLike | None = None, repository: str | None = None
) -> str | EncodedImage | UnreadableImage:
    """The image that a text in a table names: a path, a data URI, or the file's content if it lies in an archive.

    Args:
        text: A path, base64, a data URI, or what `datasets` calls a file in an archive or in a repository.
        folder: The folder that relative paths start from.
        repository: `org/name` of the data set of the Hub that the table comes from. What such a table names has to be
            in this repository, in the caches of the Hugging Face libraries, or below `folder`, so that a data set
            cannot bring other files of the machine into the training.
    """
    if text.startswith(("http://", "https://", "data:")):
        return text
    container = text.split("::")[-1]
    if "://" in text:
        is_archive = "::" in text and all(hop.startswith(ARCHIVES) for hop in text.split("::")[:-1])
        if ("::" in text and not is_archive) or not _may_read(container, folder, repository):
            return UnreadableImage(text[:200], _refusal(text, repository))
        return _read(text)
    if repository is None:
        return text if folder is None else resolve_path(text, folder)
    if _may_read(text, folder, repository):
        return os.path.join(folder or "", text)
    if PurePosixPath(text).suffix.lower() in image_suffixes():
        return UnreadableImage(text[:200], _refusal(text, repository))
    return f"data:image/unknown;base64,{text}"  # of which no path is opened


def _may_read(path: str, folder: str | os.PathLike | None, repository: str | None) -> bool:
    if "://" in path:
        inside = repository is not None and path.lower().startswith(
            tuple(f"{HUB}{repository}{end}".lower() for end in "@/")
        )
        return inside and ".." not in path.split("/")
    if repository is None:
        return True
    try:
        if folder is not None and _lies_in(os.path.join(folder, path), folder):
            return os.path.exists(os.path.join(folder, path))
        return os.path.isabs(path) and any(_lies_in(path, cache) for cache in _caches())
    except ValueError:  # a null byte
        return False


def _lies_in(path: str, folder: str | os.PathLike) -> bool:
    real, root = os.path.realpath(path), os.path.realpath(folder)
    return os.path.commonpath([real, root]) == root


def _caches() -> list[str]:
    from datasets import config

    folders = (constants.HF_HUB_CACHE, config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH)
    return [str(folder) for folder in folders]


def _refusal(text: str, repository: str | None) -> str:
    if repository is None:
        return f"{text:.200} is neither a local file nor in a local archive; download it first"
    return (
        f"{text:.200} is not in the data set {repository}, and is not read; if it is one of your files, name the "
        "folder of the images by --image_root of `vlv train` or --image-root of `vlv data`, without --streaming"
    )


def _read(path: str) -> EncodedImage | UnreadableImage:
    """A file in an archive or in a repository of the Hub."""
    from datasets.utils.file_utils import xopen

    try:
        with xopen(path, "rb") as file:
            return EncodedImage.named(file.read(), path)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, HTTPError) as error:
        return UnreadableImage(path, f"it cannot be read: {error}")
