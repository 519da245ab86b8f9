"""`vlv score`: how well captions explain images to the frozen text-to-image model."""

import argparse
import hashlib
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlv.captioning.batches import read_batches
from vlv.captioning.inputs import Input, collect_images
from vlv.captioning.output import Summary, output_path
from vlv.captioning.resume import ResumableResults, read_results, refuse_results
from vlv.files import to_json

from .captions import caption_texts
from .choosing import text_to_image_fingerprint
from .models import choose_model, loading
from .scoring import BatchScorer


def run(arguments: argparse.Namespace) -> int:
    output = output_path(arguments.output, ".json")
    if not (arguments.resume or arguments.overwrite):
        refuse_results(output)
    inputs = collect_images(arguments.paths)
    entries = read_results(arguments.captions, "--captions")
    inputs, texts = match_captions(inputs, entries, arguments.captions)
    if unused := entries.keys() - {item.name for item in inputs}:
        print(f"note: {len(unused)} of the entries of {arguments.captions} are of other images", file=sys.stderr)
    source = choose_model(arguments)
    with loading(source):
        fingerprint = text_to_image_fingerprint(source, arguments.revision)
    recorded = {
        "num_pairs": arguments.num_pairs,
        "dtype": arguments.dtype,
        "captions": hashlib.blake2b(to_json(entries), digest_size=16).hexdigest(),
    }
    results = ResumableResults(output, (source, fingerprint), recorded, shared=tuple(recorded))
    names, kept = [item.name for item in inputs], None
    if arguments.resume and output.exists():
        left = results.resume(inputs)
        inputs, kept = left, len(inputs) - len(left)
    summary = Summary(len(inputs), names_failures=False)
    with results:
        scorer = BatchScorer(source, arguments)
        for batch in read_batches(
            *(inputs, scorer.pipeline.image_processor, arguments.batch_size, summary, scorer.image_size, True)
        ):
            rows = scorer.score(batch, [texts[name] for name in batch.names], summary)
            scored = [(item, row) for item, row in zip(batch.inputs, rows, strict=True) if row is not None]
            values = [row if isinstance(entries[item.name], list) else row[0] for item, row in scored]
            if scored:
                results.add([item for item, _ in scored], values)
            summary.done += len(scored)
            summary.advance(len(batch.inputs))  # also those whose scores failed
    scorer.print_notes()
    written = read_results(output, "--output")
    kept_and_new = [written[name] for name in names if name in written]
    found: list[float] = [score for row in kept_and_new for score in (row if isinstance(row, list) else [row])]
    if found:
        better = sum(score > 0 for score in found)
        print(
            f"{len(found)} captions: mean score {statistics.fmean(found):.4f}, lowest {min(found):.4f}; "
            f"{better} explain more than no words"
        )
    return summary.close("scored", str(output), kept)


def match_captions(
    inputs: list[Input], entries: dict[str, Any], file: str | Path
) -> tuple[list[Input], dict[str, list[str]]]:
    """The inputs, with the `problem` of those that have no captions, and the captions of the others by name.

    Args:
        entries: Of the file, by the names of images.
    """
    texts: dict[str, list[str]] = {}
    matched = []
    for item in inputs:
        problem = item.problem
        if item.name not in entries:
            problem = problem or f"{file} has no caption of it"
        else:
            try:
                texts[item.name] = caption_texts(entries[item.name])
            except ValueError as error:
                problem = problem or f"{file}: {error}"
        matched.append(replace(item, problem=problem))
    return matched, texts
