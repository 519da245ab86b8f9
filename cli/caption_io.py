"""What `vlv caption` reads and writes: checks its options, opens the inputs, and prints a dry run."""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import Any

from vlv.captioning.batches import Batch, split_batch
from vlv.captioning.captioner import Captioner
from vlv.captioning.dataset_rows import DatasetArguments
from vlv.captioning.formats import caption_output
from vlv.captioning.inputs import Input
from vlv.captioning.metadata import XmpCaptions
from vlv.captioning.output import Summary, require_writable
from vlv.captioning.resume import ResumableResults
from vlv.captioning.sidecars import CaptionFiles, SharedSidecar, Sidecars, UnsupportedFile, ends_the_run, read_sidecar
from vlv.captioning.sources import LOOKAHEAD, Inputs
from vlv.captioning.tables import LIST_SUFFIXES
from vlv.captioning.texts import CaptionEditor, PromptTemplate, prompt_fields
from vlv.errors import UserError

SHOWN = 10
"""Inputs that a dry run names."""


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises `UserError` for options that contradict each other, or need others."""
    if sum(map(bool, (arguments.paths, arguments.embeddings, arguments.dataset))) != 1:
        raise UserError("give image paths or --embeddings FILE or --dataset, and not several of them")
    for option, value in (
        ("--embeddings-cache", arguments.embeddings_cache),
        ("--encoder-batch-size", arguments.encoder_batch_size),
        ("--sidecar", arguments.sidecar and not arguments.sidecar_dir),
        ("--metadata", arguments.metadata),
    ):
        if arguments.embeddings and value:
            raise UserError(f"{option} is for images, which --embeddings replaces; leave one out")
    check_dependent_arguments(arguments)
    if arguments.metadata and arguments.num_captions > 1 and not arguments.best_by:
        raise UserError("--metadata has one caption of an image; add --best-by score, or leave out --num-captions")
    if arguments.resume and arguments.streaming:
        raise UserError("--resume would keep all rows of --streaming in memory to list them first; leave one out")
    if arguments.dataset and arguments.sidecar and not arguments.sidecar_dir:
        raise UserError("--sidecar with --dataset needs --sidecar-dir DIR, since its images are not files")
    prompt_fields(arguments.prompt)


def check_dependent_arguments(arguments: argparse.Namespace) -> None:
    """Raises `UserError` for options that need others."""
    beside = arguments.sidecar or arguments.metadata
    with_columns = (".parquet", *LIST_SUFFIXES)
    of_hub = arguments.dataset is not None and not os.path.exists(arguments.dataset)
    tables = arguments.shards is not None or any(path.lower().endswith(with_columns) for path in arguments.paths)
    for option, value, usable, needed in (
        ("--split", arguments.split, arguments.dataset, "--dataset"),
        ("--streaming", arguments.streaming, arguments.dataset, "--dataset"),
        ("--dataset-revision", arguments.dataset_revision, of_hub, "--dataset ORG/NAME of the Hub"),
        ("--image-column", arguments.image_column, arguments.dataset or tables, "--dataset, or parquet or list files"),
        ("--image-root", arguments.image_root, tables and not arguments.dataset, "parquet or list files"),
        ("--sidecar-dir", arguments.sidecar_dir, arguments.sidecar, "--sidecar"),
        ("--sidecar-name", arguments.sidecar_name, arguments.sidecar, "--sidecar"),
        ("--on-existing", arguments.on_existing, beside, "--sidecar or --metadata"),
        (
            *("--separator", arguments.separator is not None),
            *(arguments.on_existing in ("append", "prepend"), "--on-existing append or prepend"),
        ),
        ("--resume", arguments.resume, arguments.output or not beside, "--output (or pass --on-existing skip)"),
        ("--overwrite", arguments.overwrite, arguments.output or not beside, "--output (or --on-existing overwrite)"),
    ):
        if value and not usable:
            raise UserError(f"{option} needs {needed}")
    if arguments.image_root and not os.path.isdir(arguments.image_root):
        raise UserError(f"--image-root {arguments.image_root} is not a folder")


def choose_output(arguments: argparse.Namespace) -> Path | None:
    """The file of `--output`; None for captions that are written beside their images alone."""
    if arguments.output is None and not (arguments.sidecar or arguments.metadata):
        arguments.output = "captions.json"
    if arguments.output is None:
        return None
    return caption_output(arguments.output, arguments.paths[0] if len(arguments.paths) == 1 else None)


def open_inputs(arguments: argparse.Namespace) -> Inputs:
    """The images that are given by paths or as a data set."""
    dataset, column = None, arguments.image_column or "image"
    if arguments.dataset:
        own = arguments.split, column, arguments.streaming, arguments.dataset_revision
        dataset = DatasetArguments(arguments.dataset, *own)
    quiet = [f".{arguments.sidecar}"] if arguments.sidecar else []
    return Inputs(arguments.paths, dataset, column, arguments.url_timeout, quiet, arguments.image_root)


def open_caption_files(arguments: argparse.Namespace) -> CaptionFiles | None:
    """What writes the captions beside or into images; None if they are not asked for."""
    existing = {
        "on_existing": arguments.on_existing or "error",
        "separator": ", " if arguments.separator is None else arguments.separator,
    }
    if arguments.metadata:
        return XmpCaptions(**existing)
    if not arguments.sidecar:
        return None
    if arguments.sidecar_dir:
        require_writable(Path(arguments.sidecar_dir), "--sidecar-dir", arguments.sidecar_dir)
    count = 1 if arguments.best_by else arguments.num_captions
    folder = Path(arguments.sidecar_dir) if arguments.sidecar_dir else None
    return Sidecars(arguments.sidecar, folder, arguments.sidecar_name == "full", count, **existing)


def check_first(files: CaptionFiles, inputs: Iterable[Input]) -> None:
    """Raises `UserError` if one of the first inputs has a caption, or its caption cannot be put there."""
    trial = files.copy()
    for item in islice(inputs, LOOKAHEAD):
        if item.problem is None:
            with suppress(SharedSidecar, UnsupportedFile):  # it is one image that fails
                trial.wants(item)


def claim_kept(files: CaptionFiles, listed: Iterable[Input], left: Sequence[Input]) -> None:
    """Keeps the captions of inputs that are not captioned again from those that are."""
    names = {item.name for item in left}
    for item in listed:
        if item.name not in names:
            with suppress(UserError):
                files.claim(item)


def adopt_written(results: ResumableResults, files: CaptionFiles, left: Iterable[Input]) -> list[Input]:
    """Keeps results of a run that ended after their captions were written and before they were confirmed.

    Returns:
        The other inputs.
    """
    others = []
    for item in left:
        try:
            is_written = item.name in results.unconfirmed and files.holds(item, results.unconfirmed[item.name])
            if is_written:
                results.adopt(item, results.unconfirmed[item.name])
        except (OSError, ValueError):
            is_written = False
        if not is_written:
            others.append(item)
    return others


def open_editor(arguments: argparse.Namespace) -> CaptionEditor:
    return CaptionEditor(arguments.loop_guard, arguments.prefix, arguments.suffix, arguments.trigger_word)


def open_template(prompt: str | None) -> PromptTemplate | None:
    """The prompt, if it has fields that differ from image to image."""
    return PromptTemplate(prompt or "", read_sidecar) if prompt_fields(prompt) else None


def count_in_background(inputs: Inputs, summary: Summary) -> None:
    """Gives the progress bar its total, which takes a search of its own, while captions are written."""
    if inputs.total is None and summary.shows_progress:
        Thread(target=lambda: summary.set_total(inputs.count()), daemon=True).start()


def caption_batch(captioner: Captioner, batch: Batch, summary: Summary) -> Iterator[tuple[Batch, list[list[str]]]]:
    """The batch with the captions of each input. An input whose own prompt is too long fails alone."""
    try:
        groups = captioner.caption(batch)
    except ValueError as error:
        if captioner.template is None:
            raise
        if len(batch.inputs) > 1:
            for row in split_batch(batch):
                yield from caption_batch(captioner, row, summary)
        else:
            summary.fail(batch.names[0], f"its prompt: {error}", "caption")
        return
    yield batch, groups


def write_files(files: CaptionFiles, inputs: list[Input], entries: list[Any], summary: Summary) -> list[Input]:
    """Writes captions beside or into images; returns the inputs whose captions are written.

    Raises:
        OSError: If the disk is full, so that the next ones could not be written, too.
    """
    written = []
    for item, entry in zip(inputs, entries, strict=True):
        try:
            written.append(files.write(item, entry))
        except (OSError, ValueError) as error:
            if ends_the_run(error):
                raise
            reason = getattr(error, "strerror", None) or str(error)
            summary.fail(item.name, f"{files.place(item)}: {reason}", "write the caption of")
    return written


def dry_run(inputs: Iterable[Input], files: CaptionFiles | None, output: Path | None, kept: int | None = None) -> int:
    """Prints the first inputs that would be captioned with where their captions would be, and counts all."""
    summary, count = Summary(None, names_failures=False), 0
    for item in files.select(inputs, summary) if files is not None else inputs:
        if item.problem is not None:
            summary.fail(item.name, item.problem)
            continue
        count += 1
        if count <= SHOWN:
            places = [str(output)] if output is not None else []
            places += [files.place(item)] if files is not None else []
            print(f"{item.name} -> {', '.join(places)}")
    if count > SHOWN:
        print(f"... and {count - SHOWN:,} more")
    sys.stdout.flush()
    skipped = "" if files is None else f"skip {files.skipped:,}, "
    before = "" if kept is None else f"keep {kept:,}, "
    failed = summary.num_failed
    summary.end()
    print(f"dry run: would {before}{skipped}caption {count:,}, fail {failed:,}; nothing is written", file=sys.stderr)
    return 1 if failed else 0
