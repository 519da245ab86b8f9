"""`vlv data`: prepares data for training."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlv.captioning.output import output_path
from vlv.errors import UserError

from .parsers.data import COLUMN_KINDS

SHOWN_FAILED = 3
"""Failed images that a step names; a file in its output names all."""


class _Progress:
    """A bar, of which the total may come later."""

    def __init__(self, bar: tqdm):
        self._bar = bar

    def advance(self, count: int) -> None:
        self._bar.update(count)

    def expect(self, total: int) -> None:
        self._bar.total = total
        self._bar.refresh()


def run_filter(arguments: argparse.Namespace) -> int:
    from vlv.preparation.filter import filter_metadata
    from vlv.preparation.rules import Rules

    output = output_path(arguments.output, ".parquet")
    columns = {kind: name for kind in COLUMN_KINDS if (name := getattr(arguments, f"{kind}_column"))}
    with _step("rows") as progress:
        rules = Rules(
            arguments.min_side,
            arguments.aspect_ratio,
            arguments.max_watermark,
            arguments.min_aesthetic,
            arguments.keep_missing,
        )
        counts = filter_metadata(
            arguments.files,
            output,
            rules,
            columns=columns,
            sample=arguments.sample,
            seed=arguments.seed,
            key=arguments.key,
            overwrite=arguments.overwrite,
            advance=progress.advance,
            expect=progress.expect,
        )
    return _say(counts, output, "read {rows} rows, {passed} pass, wrote {written}")


def run_download(arguments: argparse.Namespace) -> int:
    from vlv.preparation.download import DownloadConfig, download

    config = DownloadConfig(
        arguments.image_size,
        arguments.resize_mode,
        arguments.shard_images,
        arguments.processes,
        arguments.threads,
        arguments.timeout,
        arguments.time_limit,
        arguments.stall_limit,
        arguments.passes,
    )
    with _step("images") as progress:
        counts = download(
            arguments.files,
            arguments.output,
            config,
            program=arguments.img2dataset,
            url_column=arguments.url_column,
            caption_column=arguments.caption_column,
            overwrite=arguments.overwrite,
            advance=progress.advance,
            expect=progress.expect,
        )
    return _say(counts, arguments.output, "{urls} URLs: {images} images, {failed} failed", "failed")


def run_pack(arguments: argparse.Namespace) -> int:
    from vlv.preparation.pack import pack

    by_size = arguments.shard_mb is not None
    with _step("images") as progress:
        counts = pack(
            _records(arguments, progress),
            arguments.output,
            format=arguments.format,
            shard_images=None if by_size else arguments.shard_images or 1000,
            shard_bytes=int(arguments.shard_mb * 1e6) if by_size else None,
            overwrite=arguments.overwrite,
            advance=progress.advance,
        )
    return _say(counts, arguments.output, "packed {images} images in {shards} shards, failed {failed}", "failed")


def run_dedup(arguments: argparse.Namespace) -> int:
    from vlv.preparation.dedup import dedup

    with _step("images") as progress:
        counts = dedup(
            _records(arguments, progress),
            arguments.output,
            distance=arguments.distance,
            workers=arguments.workers or os.cpu_count() or 1,
            overwrite=arguments.overwrite,
            advance=progress.advance,
        )
    said = "kept {kept} of {images} images, {duplicates} duplicates in {groups} groups, failed {failed}"
    return _say(counts, arguments.output, said, "failed")


def run_recaption(arguments: argparse.Namespace) -> int:
    from vlv.evaluation.endpoint import EndpointSettings
    from vlv.preparation.recaption import DEFAULT_PROMPT, RecaptionConfig, Stopped, estimate, recaption

    output = output_path(arguments.output, ".jsonl")
    of_endpoint = (
        *("model", "base_url", "key_variable", "concurrency", "timeout", "max_retries", "max_tokens", "temperature"),
        *("price_in", "price_out", "max_price", "max_failures"),
    )
    with _step("images") as progress:
        config = RecaptionConfig(
            EndpointSettings(**{name: getattr(arguments, name) for name in of_endpoint}),
            DEFAULT_PROMPT if arguments.prompt is None else _read_prompt(arguments.prompt),
            arguments.max_side,
            arguments.min_words,
            arguments.requests_per_minute,
            arguments.passes,
        )
        try:
            if arguments.estimate:
                _say_estimate(estimate(_records(arguments, progress), output, config, arguments.estimate))
                return 0
            records = _records(arguments, progress)
            counts = recaption(records, output, config, overwrite=arguments.overwrite, advance=progress.advance)
        except Stopped as error:
            raise UserError(str(error)) from error
    said = "captioned {captioned} of {images} images (refused {refused}, malformed {malformed}, unreadable "
    said += "{unreadable}, failed {failed}), {prompt_tokens} + {completion_tokens} tokens, price {price:.4f}"
    code = _say(counts, output, said, "failed", "unreadable")
    if not records.in_files:
        source = shlex.quote(arguments.source)
        print(
            f"the images are in shards or tables: `vlv data pack {source} --captions {shlex.quote(str(output))} "
            "--output PAIRS` packs them with their captions for stage 2",
            file=sys.stderr,
        )
    return code


def run_inspect(arguments: argparse.Namespace) -> int:
    from vlv.preparation.inspection import inspect_images

    with _step("images") as progress:
        counts = inspect_images(
            _records(arguments, progress),
            arguments.output,
            thumbnails=arguments.thumbnails,
            distance=arguments.distance,
            workers=arguments.workers or os.cpu_count() or 1,
            overwrite=arguments.overwrite,
            advance=progress.advance,
        )
    said = "inspected {images} images: {failed} cannot be read, {equal_files} groups of equal files, "
    return _say(counts, arguments.output, said + "{near_duplicates} of near duplicates", "failed")


def run_split(arguments: argparse.Namespace) -> int:
    from vlv.preparation.split import split

    with _step("images") as progress:
        counts = split(
            _records(arguments, progress),
            arguments.output,
            validation=arguments.validation,
            test=arguments.test,
            by=arguments.by,
            seed=arguments.seed,
            groups=arguments.groups,
            overwrite=arguments.overwrite,
            advance=progress.advance,
        )
    said = "{train} images to train, {validation} to validate, {test} to test, failed {failed}"
    return _say(counts, arguments.output, said, "failed")


def _records(arguments: argparse.Namespace, progress: _Progress) -> Any:
    from vlv.preparation.records import Records

    columns = {name: value for name in ("image_column", "caption_column") if (value := getattr(arguments, name, None))}
    options = {name: getattr(arguments, name) for name in ("pairs", "captions") if hasattr(arguments, name)}
    records = Records(arguments.source, image_root=arguments.image_root, **options, **columns)
    progress.expect(len(records))
    return records


def _read_prompt(file: str) -> str:
    try:
        prompt = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt {file} cannot be read as a text file: {error}") from error
    if not prompt:
        raise UserError(f"--prompt {file} is empty; write into it what the model is asked")
    return prompt


def _say_estimate(found: Mapping[str, Any]) -> None:
    asked, images = found["asked"], found["images"]
    tokens = [found[name] for name in ("prompt_tokens", "completion_tokens")]
    print(
        f"asked for {asked} images: {tokens[0]:.0f} + {tokens[1]:.0f} tokens each; {images} images take about "
        f"{images * tokens[0]:.0f} + {images * tokens[1]:.0f} tokens, price {found['price']:.4f}"
    )


@contextmanager
def _step(unit: str) -> Iterator[_Progress]:
    """A progress bar on a terminal. What the user can correct is a `UserError`."""
    with tqdm(unit=f" {unit}", disable=None) as bar:
        try:
            yield _Progress(bar)
        except ValueError as error:
            raise UserError(str(error)) from error


def _say(counts: Mapping[str, Any] | None, output: str | os.PathLike, text: str, *failed: str) -> int:
    """Prints what a step has done; returns the exit code, 1 if a count of these names is not 0."""
    from vlv.preparation.run import Run

    if counts is None:
        print(f"{output} is complete: nothing to do", file=sys.stderr)
        counts = Run.read_counts(Path(output))
    else:
        _say_failures(Path(output))
        print(f"{text.format(**counts)}: {output}", file=sys.stderr)
    return int(any(counts[name] for name in failed))


def _say_failures(output: Path) -> None:
    """Prints the first images of an output folder that failed, with their reasons."""
    from vlv.preparation.inspection import REPORT
    from vlv.preparation.run import FAILED

    for name, read in ((FAILED, dict), (REPORT, lambda report: report["failed"])):
        if (file := output / name).is_file():
            failed = read(json.loads(file.read_text(encoding="utf-8")))
            for image, reason in islice(failed.items(), SHOWN_FAILED):
                print(f"cannot read {image}: {reason}", file=sys.stderr)
            if len(failed) > SHOWN_FAILED:
                print(f"and {len(failed) - SHOWN_FAILED} more: {file}", file=sys.stderr)
