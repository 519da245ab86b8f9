"""What the commands of `vlv evaluate` share: images of a folder, references of captions, errors and progress."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from .errors import UserError
from .inputs import collect_images, positive
from .models import choose_device, loading

if TYPE_CHECKING:
    from vlv.evaluation.caption_sets import CaptionSet


def not_negative(text: str) -> int:
    """An argparse type: a whole number from 0 up."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {value}")
    return value


def read_images(folder: str, option: str) -> dict[str, Path]:
    """The images of a folder by name.

    Raises:
        UserError: If it is not a folder, has no images, or one that cannot be read: figures of the others would be
            those of another set.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{option} {folder} is not a folder")
    found = collect_images([folder])
    for item in found:
        if item.problem is not None:
            raise UserError(f"{item.path}: {item.problem}; remove it, or repair it")
    return {item.name: item.path for item in found}


@contextmanager
def as_user_errors() -> Iterator[None]:
    """Turns errors of what the user gave into `UserError`."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error


@contextmanager
def progress(total: int, title: str, is_shown: bool = True) -> Iterator[Any]:
    """A progress bar on a terminal; yields the function that advances it by a number of images."""
    with tqdm(total=total, desc=title, unit=" images", disable=None if is_shown else True) as bar:
        yield bar.update


def add_reference_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what captions are measured against."""
    parser.add_argument(
        "--references", metavar="FILE", help="JSON: {image: [caption, ...]}, or COCO's caption annotations"
    )
    parser.add_argument("--clip", metavar="MODEL", help="folder or Hub repo id of a CLIP model, for CLIPScore")
    parser.add_argument("--bert", metavar="MODEL", help="folder or Hub repo id of a text encoder, for BERTScore")
    parser.add_argument(
        "--bert-layer", type=positive, metavar="N", help="the layer of --bert to compare (default: the last)"
    )
    parser.add_argument(
        "--vocabulary", metavar="FILE", help="JSON: {object: [synonym, ...]}, the objects that CHAIR looks for"
    )
    parser.add_argument(
        "--objects",
        metavar="FILE",
        help="JSON: {image: [object, ...]}, what the images show, for CHAIR (default: what the references mention)",
    )


def require_references(arguments: argparse.Namespace) -> None:
    """Raises `UserError` for options of `add_reference_arguments` that need others."""
    if arguments.objects and not arguments.vocabulary:
        raise UserError("--objects needs --vocabulary FILE, the objects that CHAIR looks for")
    if arguments.vocabulary and not (arguments.objects or arguments.references):
        raise UserError("--vocabulary needs --objects FILE, or --references that mention the objects")
    if arguments.bert and not arguments.references:
        raise UserError("BERTScore compares captions with references; pass --references FILE with --bert")


def read_references(arguments: argparse.Namespace, names: Sequence[str]) -> "CaptionSet":
    """What the images are measured against, by the options of `add_reference_arguments`, without captions.

    Raises:
        ValueError: If a file cannot be read, or has no entry for an image.
    """
    from vlv.evaluation import caption_sets

    given = caption_sets.CaptionSet(list(names), [])
    for option in ("references", "objects"):
        if path := getattr(arguments, option):
            entries = caption_sets.entries_of(names, caption_sets.read_lists(path), f"--{option} {path}")
            setattr(given, option, entries)
    if arguments.vocabulary:
        given.vocabulary = caption_sets.read_lists(arguments.vocabulary)
    return given


def load_clip(arguments: argparse.Namespace) -> Any:
    """The model of `--clip`; None without it.

    Raises:
        UserError: If it cannot be loaded, or embeds no texts.
    """
    if not arguments.clip:
        return None
    from vlv.evaluation.features import AutoModelFeatures

    with loading(f"--clip {arguments.clip}"):
        clip = AutoModelFeatures(arguments.clip, choose_device(arguments))
    if not clip.is_contrastive:
        raise UserError(f"--clip {arguments.clip} embeds no texts; pass a CLIP or SigLIP model")
    return clip


def embed_images(clip: Any, paths: Sequence[Path], batch_size: int) -> Any:
    """The features `(N, width)` of image files by the model of `--clip`."""
    from vlv.evaluation.image_sets import extract_statistics

    with progress(len(paths), "features of images") as advance:
        return extract_statistics(paths, clip, batch_size, advance=advance).features
