"""Finds the images in folders: by suffix, by content, through links, and with a reason for what cannot be read."""

import os
import stat
from collections import Counter, deque
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path

from PIL import Image, ImageFile, UnidentifiedImageError

from .processing_vlv import add_formats

# Formats that Pillow reads only with a plug-in (pillow-heif, pillow-jxl-plugin). Without it their files are named.
PLUGIN_SUFFIXES = (".heic", ".heif", ".hif", ".jxl")
# Formats that Pillow recognises and cannot decode, besides its stubs.
UNDECODABLE_FORMATS = ("MPEG",)
# Documents whose first bytes are those of an image format.
DOCUMENT_FORMATS = ("EPS", "FPX", "MIC")


@cache
def image_suffixes() -> frozenset[str]:
    """Lower-case suffixes of image files, such as `.png`: those that Pillow decodes here, and `PLUGIN_SUFFIXES`."""
    Image.init()
    add_formats()
    return frozenset(s for s, name in Image.EXTENSION.items() if _is_decodable(name)) | frozenset(PLUGIN_SUFFIXES)


def readable_formats() -> dict[str, list[str]]:
    """The formats that Pillow decodes here, each with the suffixes of its files."""
    image_suffixes()
    formats: dict[str, list[str]] = {}
    for suffix, name in sorted(Image.EXTENSION.items()):
        if _is_decodable(name):
            formats.setdefault(name, []).append(suffix)
    return dict(sorted(formats.items()))


@cache
def _formats_with_a_signature() -> tuple[str, ...]:
    """Formats whose files begin with bytes of their own, so that other files are not taken for them."""
    Image.init()
    add_formats()
    return tuple(
        name
        for name, (_, accept) in Image.OPEN.items()
        if accept is not None and _is_decodable(name) and name not in DOCUMENT_FORMATS
    )


def _is_decodable(name: str) -> bool:
    if name not in Image.OPEN or name in UNDECODABLE_FORMATS:
        return False
    factory = Image.OPEN[name][0]
    return not (isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile))


def walk_images(
    folder: str | os.PathLike, left_out: Counter[str] | None = None, others: Collection[str] = ()
) -> Iterator[tuple[Path, str | None]]:
    """Each image below a folder, and each entry that cannot be read.

    A file is an image by its suffix (in any case), or else by its content. Hidden files and folders are left out.
    Links are followed; a folder is searched once, whatever number of links lead to it. Entries come in the order of
    their names; the contents of linked folders come last.

    Args:
        left_out: Counts the files that are not images, by suffix, or by name where there is no suffix.
        others: Lower-case suffixes of files that count as images, such as `.tar`.

    Yields:
        The path, and None for an image or the reason why the entry cannot be read.
    """
    links: deque[Path] = deque([Path(folder)])  # folders to search: the root, then those that links lead to
    seen: set[tuple[int, int]] = set()
    while links:
        stack: list[Iterator[Path]] = [iter([links.popleft()])]
        while stack:
            path = next(stack[-1], None)
            if path is None:
                stack.pop()
                continue
            try:
                status = os.stat(path)
            except OSError as error:
                yield path, _reason(path, error)
                continue
            if stat.S_ISDIR(status.st_mode):
                if len(stack) > 1 and path.is_symlink():
                    links.append(path)
                elif (identity := (status.st_dev, status.st_ino)) not in seen:
                    seen.add(identity)
                    try:
                        names = sorted(name for name in os.listdir(path) if not name.startswith("."))
                    except OSError as error:
                        yield path, f"the folder cannot be listed: {error.strerror}"
                        continue
                    stack.append(map(path.joinpath, names))
            elif path.suffix.lower() in others:
                yield path, None
            elif (problem := _judge(path, status.st_mode)) is not _NOT_AN_IMAGE:
                yield path, problem
            elif left_out is not None:
                left_out[path.suffix.lower() or path.name] += 1


_NOT_AN_IMAGE = "not an image"


def is_image_file(path: Path) -> bool:
    """Whether a file is an image by its suffix or its content, as in `walk_images`; also if it cannot be read."""
    try:
        return _judge(path, os.stat(path).st_mode) is not _NOT_AN_IMAGE
    except OSError:
        return path.suffix.lower() in image_suffixes()


def _judge(path: Path, mode: int) -> str | None:
    """None for an image, `_NOT_AN_IMAGE`, or the reason why the file cannot be looked into."""
    if path.suffix.lower() in image_suffixes():
        return None if stat.S_ISREG(mode) else "it is not a regular file"
    if not stat.S_ISREG(mode):
        return _NOT_AN_IMAGE
    try:
        with Image.open(path, formats=_formats_with_a_signature()):
            return None
    except UnidentifiedImageError:
        return _NOT_AN_IMAGE
    except PermissionError as error:
        return _reason(path, error)
    except Exception:  # an image with a damaged header, or text that begins like one; reading it gives the reason
        return _NOT_AN_IMAGE if _is_text(path) else None


def _is_text(path: Path) -> bool:
    """Whether the beginning of a file has no control characters, which every image format has there."""
    with open(path, "rb") as file:
        return min(file.read(512), default=0) >= ord("\t")


def _reason(path: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError) and path.is_symlink():
        return f"it is a link to {os.readlink(path)}, which does not exist"
    return f"it cannot be read: {error.strerror}"


def is_url(text: str) -> bool:
    """Whether the name of an image is that of a download."""
    return text[:8].lower().startswith(("http://", "https://"))


def find_images(folder: str | os.PathLike) -> list[Path]:
    """The images below a folder in the order of `walk_images`. Entries that cannot be read are left out."""
    return [path for path, problem in walk_images(folder) if problem is None]
