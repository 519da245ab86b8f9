"""What captions are measured against, by the options of `vlv evaluate captions` and `compare`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlv.errors import UserError

from .evaluating import progress
from .models import choose_device, loading

if TYPE_CHECKING:
    from vlv.evaluation.caption_sets import CaptionSet


def require_references(arguments: argparse.Namespace) -> None:
    """Raises `UserError` for options of `parsers.references.add_reference_arguments` that need others."""
    if arguments.objects and not arguments.vocabulary:
        raise UserError("--objects needs --vocabulary FILE, the objects that CHAIR looks for")
    if arguments.vocabulary and not (arguments.objects or arguments.references):
        raise UserError("--vocabulary needs --objects FILE, or --references that mention the objects")
    if arguments.bert and not arguments.references:
        raise UserError("BERTScore compares captions with references; pass --references FILE with --bert")


def read_references(arguments: argparse.Namespace, names: Sequence[str]) -> "CaptionSet":
    """What the images are measured against, without captions, by the options of `vlv evaluate captions`.

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

    with progress(len(paths), "features of images", True) as advance:
        return extract_statistics(paths, clip, batch_size, advance=advance).features
