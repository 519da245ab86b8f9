"""`vlv caption --shards` and `--merge`: captions of many images, a file for each shard."""

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from vlv.captioning.captioner import Captioner
from vlv.captioning.division import absolute
from vlv.captioning.formats import SUFFIXES
from vlv.captioning.merging import is_written, merge, read_shards
from vlv.captioning.output import Summary, refuse_existing, require_writable
from vlv.captioning.sharded import ShardCaptioner, ShardJob, load_captioner
from vlv.captioning.shards import ShardFolder
from vlv.captioning.sources import STDIN
from vlv.captioning.texts import prompt_fields
from vlv.errors import UserError

from .caption_io import (
    check_dependent_arguments,
    check_first,
    claim_kept,
    open_caption_files,
    write_files,
)
from .caption_job import check_prompt, prepare_job
from .choosing import complete_choice_arguments, uses_scores
from .models import choose_device, choose_model, loading
from .parsers.caption import add_parser
from .parsers.shards import ONLY_WITH_SHARDS, distribution

DEFAULT_OUTPUT = "captions.json"
SHARDS_OF_A_WRITER = 50
OF_SHARDS = {
    *("paths", "shards", "shard_index", "output_dir", "engine", "ray_actors", "ray_address", "restart_every"),
    *("dataset", "split", "dataset_revision", "image_column", "image_root", "url_timeout", "prompt", "length"),
    *("prefix", "suffix", "trigger_word", "trim", "loop_guard", "batch_size", "encoder_batch_size", "max_new_tokens"),
    *("num_beams", "as_original", "num_captions", "temperature", "seed", "embeddings_cache", "num_workers"),
    *("static_cache", "compile", "model", "revision", "device", "dtype"),
}
"""Options that `--shards` uses."""
OF_MERGE = {"merge", "output", "overwrite", "sidecar", "sidecar_dir", "sidecar_name", "on_existing", "separator"}
"""Options that `--merge` uses."""


def is_wanted(arguments: argparse.Namespace) -> bool:
    """Whether a command line of `vlv caption` is of shards.

    Raises:
        UserError: If it has options of shards without `--shards`.
    """
    if arguments.shards is not None or arguments.merge is not None:
        return True
    for name in ONLY_WITH_SHARDS:
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} needs --shards N")
    return False


def run(arguments: argparse.Namespace) -> int:
    return _merge(arguments) if arguments.merge is not None else _caption(arguments)


def _merge(arguments: argparse.Namespace) -> int:
    if others := _given(arguments) - OF_MERGE:
        raise UserError(f"--merge DIR reads shards that are done; leave out {_named(others)}")
    check_dependent_arguments(arguments)
    shards = ShardFolder.open_existing(Path(arguments.merge))
    failed = 0
    if arguments.output or not arguments.sidecar:
        failed += _merge_into_file(shards, Path(arguments.output or DEFAULT_OUTPUT), arguments.overwrite)
    if arguments.sidecar:
        failed += _write_sidecars(shards, arguments)
    return int(failed > 0)


def _merge_into_file(shards: ShardFolder, output: Path, overwrite: bool) -> int:
    """Writes the captions into one file; returns the number of images without a caption."""
    if output.suffix.lower() not in SUFFIXES:
        raise UserError(f"--output {output} must end in {', '.join(SUFFIXES)}")
    require_writable(output.parent, "--output", str(output))
    if not overwrite:
        refuse_existing(output, "--output")
    counts = merge(shards, output)
    print(f"merged {counts['captioned']}, failed {counts['failed']}: {output}", file=sys.stderr)
    return counts["failed"]


def _write_sidecars(shards: ShardFolder, arguments: argparse.Namespace) -> int:
    """Writes the captions beside their images; returns a number above 0 if an image has none."""
    arguments.num_captions = int(shards.run["settings"].get("num_captions", 1))
    files = open_caption_files(arguments)
    assert files is not None
    counts = shards.run["counts"]
    summary = Summary(None if counts["files"] else counts["images"], names_failures=False)
    for inputs, entries, lost in read_shards(shards):
        for name, reason in lost.items():
            summary.fail(name, reason, "write the caption of")
        left = [item for item in inputs if not is_written(files, item, entries[item.name])]
        claim_kept(files, inputs, left)
        if not summary.done:
            check_first(files, left)
        for item in files.select(left, summary):
            summary.done += len(write_files(files, [item], [entries[item.name]], summary))
            summary.advance(1)
        files.skipped += len(inputs) - len(left)
    failed = summary.close("wrote", arguments.sidecar_dir or "sidecars beside the images", None, files.skipped)
    without = sum(shards.counts(index)["failed"] for index in range(shards.count))
    if without:
        print(f"{without} images have no caption (see the `error` lines of the shards)", file=sys.stderr)
    return failed + without


def _caption(arguments: argparse.Namespace) -> int:
    _check(arguments)
    complete_choice_arguments(arguments)
    engine = _engine(arguments)
    folder = Path(arguments.output_dir)
    require_writable(folder, "--output-dir", arguments.output_dir)
    source = choose_model(arguments)
    device = arguments.device or "" if arguments.engine == "ray" else _device(arguments)
    job, recorded = prepare_job(arguments, source, device)
    settings = job.settings
    run = {
        "shards": arguments.shards,
        **recorded,
        "settings": recorded["settings"] | engine,
        "inputs": [absolute(path) for path in arguments.paths],
        "image_column": arguments.image_column or "image",
        "image_root": os.path.abspath(arguments.image_root) if arguments.image_root else None,
        "dataset": _dataset(arguments),
    }
    captioner = None
    if settings.prompt and not ShardFolder.is_begun(folder):
        captioner = _checked_captioner(arguments, job, source)
    shards = ShardFolder.begin(folder, arguments.paths, run)
    own = own_shards(arguments)
    wanted = [index for index in own if not shards.is_done(index)]
    if len(own) > len(wanted):
        print(f"{len(own) - len(wanted)} of {len(own)} shards are done", file=sys.stderr)
    for _ in _run(arguments, job, shards, wanted, source, captioner):
        pass
    if left := [index for index in own if not shards.is_done(index)]:
        print(f"{len(left)} shards are left out, since other processes write them", file=sys.stderr)
    if not shards.missing():
        print(f"all {shards.count} shards are done; next: vlv caption --merge {folder} --output FILE", file=sys.stderr)
    return int(any(shards.counts(index)["failed"] for index in own if shards.is_done(index)))


def _checked_captioner(arguments: argparse.Namespace, job: ShardJob, source: str) -> Captioner | None:
    """Loads the model and checks that it can read `--prompt`, before the inputs are listed.

    Returns:
        The model, if this process captions.

    Raises:
        UserError: If the prompt is too long.
    """
    here = arguments.engine in (None, "local")
    with loading(source):
        captioner = load_captioner(job if here else replace(job, device="cpu", static_cache=False, compiled=False))
    check_prompt(arguments.prompt, source, captioner.model, captioner.processor)
    return captioner if here else None


def _check(arguments: argparse.Namespace) -> None:
    """Raises `UserError` for options that do not fit shards."""
    if arguments.embeddings or bool(arguments.paths) == bool(arguments.dataset):
        raise UserError("--shards needs images: either paths (folders, globs, URLs, tar files, ...) or --dataset")
    if STDIN in arguments.paths:
        raise UserError("--shards cannot tell whether - has the same list when it goes on; give a list file instead")
    if arguments.streaming:
        raise UserError("--shards reads rows by their number, which --streaming cannot; leave it out")
    if arguments.sidecar:
        raise UserError("--sidecar is given with --merge, when all shards are done; leave it out of --shards")
    if arguments.output_dir is None:
        raise UserError("--shards needs --output-dir DIR, the folder of the shards")
    if arguments.output not in (None, DEFAULT_OUTPUT):
        raise UserError("--shards writes into --output-dir; give --output with --merge, when all shards are done")
    if prompt_fields(arguments.prompt):
        raise UserError("--prompt with fields such as {name} is not possible with --shards; leave them out")
    if arguments.overwrite:
        raise UserError("--shards replaces no shards; remove those to be made again, or pass another --output-dir")
    if uses_scores(arguments):
        raise UserError("--shards writes captions without scores; merge them, and score the file with `vlv score`")
    if others := _given(arguments) - OF_SHARDS - {"output"}:
        raise UserError(f"{_named(others)} cannot be used with --shards; leave out what is not of shards")
    check_dependent_arguments(arguments)
    for name, engine in (("ray_actors", "ray"), ("ray_address", "ray"), ("restart_every", "vllm")):
        if getattr(arguments, name) is not None and arguments.engine != engine:
            raise UserError(f"--{name.replace('_', '-')} needs --engine {engine}")
    if arguments.engine == "ray" and arguments.device not in (None, "cpu", "cuda"):
        raise UserError(f"--device {arguments.device}: Ray chooses the GPU of each actor; give cpu or cuda")
    sampled = arguments.num_captions > 1 or arguments.temperature is not None
    if arguments.engine == "vllm" and (sampled or arguments.num_beams > 1 or arguments.as_original):
        raise UserError(
            "--engine vllm writes one greedy caption; leave out --num-captions, --temperature, --num-beams and "
            "--as-original"
        )
    if arguments.engine == "vllm" and (arguments.static_cache or arguments.compile):
        raise UserError("--engine vllm has a cache of its own and compiles; leave out --static-cache and --compile")
    if arguments.shard_index is not None and arguments.shard_index >= arguments.shards:
        raise UserError(f"--shard-index is {arguments.shard_index}; expected 0 to {arguments.shards - 1}")


def _dataset(arguments: argparse.Namespace) -> dict[str, str | None] | None:
    """What a run records of `--dataset`: a local one by its absolute path."""
    if arguments.dataset is None:
        return None
    is_local = os.path.exists(arguments.dataset)
    name = os.path.abspath(arguments.dataset) if is_local else arguments.dataset
    return {"name": name, "split": arguments.split, "revision": arguments.dataset_revision}


def _given(arguments: argparse.Namespace) -> set[str]:
    """The options of a command line that have other values than by default."""
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    defaults = vars(parser.parse_args(["caption"]))
    return {name for name, default in defaults.items() if getattr(arguments, name) != default}


def _named(options: set[str]) -> str:
    names = ["image paths" if name == "paths" else f"--{name.replace('_', '-')}" for name in sorted(options)]
    return ", ".join(names)


def own_shards(arguments: argparse.Namespace) -> list[int]:
    """The shards that this process does, in order: its share, and for a task of an array those of the others."""
    count = arguments.shards
    if arguments.shard_index is not None:
        return [arguments.shard_index]
    place = distribution()
    share = [*range(place.rank, count, place.processes or count)]
    if not place.takes_others:
        return share
    start = place.rank * count // (place.processes or count)  # tasks begin at different shards of the others
    return list(dict.fromkeys([*share, *((start + number) % count for number in range(count))]))


def _engine(arguments: argparse.Namespace) -> dict[str, str]:
    """What is recorded of the engine: of those that write the captions of `generate`, nothing.

    Raises:
        ImportError: If it is not installed.
    """
    if arguments.engine == "ray":
        from vlv.captioning.ray_engine import import_ray

        import_ray()
    elif arguments.engine == "vllm":
        from vlv.captioning.vllm_engine import recorded_engine

        return recorded_engine()
    return {}


def _device(arguments: argparse.Namespace) -> str:
    """The device of `choose_device`; of several processes on a machine with GPUs, each has its own."""
    local = os.environ.get("LOCAL_RANK")
    if arguments.device is None and local is not None and torch.cuda.is_available():
        return f"cuda:{int(local) % torch.cuda.device_count()}"
    return choose_device(arguments)


def _run(
    arguments: argparse.Namespace,
    job: ShardJob,
    shards: ShardFolder,
    wanted: list[int],
    source: str,
    captioner: Captioner | None,
) -> Iterator[dict[str, int] | None]:
    """The counts of each wanted shard when it is done; None for one that another process writes."""
    if not wanted:
        return
    if arguments.engine == "ray":
        from vlv.captioning.ray_engine import caption_by_ray

        yield from caption_by_ray(job, shards, wanted, arguments.ray_actors, arguments.ray_address)
    elif arguments.engine == "vllm":
        from vlv.captioning.vllm_engine import caption_by_vllm

        yield from caption_by_vllm(job, shards, wanted, arguments.restart_every or SHARDS_OF_A_WRITER)
    else:
        with loading(source):
            writer = ShardCaptioner(job, captioner)
        yield from (writer.caption(shards, index) for index in wanted)
