"""`vlv score`: how well captions explain images to the frozen text-to-image model."""

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlv.captioning.batches import read_batches
from vlv.captioning.inputs import Input, collect_images
from vlv.captioning.output import GrowingJson, Summary, output_path, refuse_existing
from vlv.captioning.resume import read_results

from .captions import caption_texts
from .models import choose_model
from .scoring import BatchScorer


def run(arguments: argparse.Namespace) -> int:
    output = output_path(arguments.output, ".json")
    if not arguments.overwrite:
        refuse_existing(output, "--output")
    inputs = collect_images(arguments.paths)
    entries = read_results(arguments.captions, "--captions")
    inputs, texts = match_captions(inputs, entries, arguments.captions)
    if unused := entries.keys() - {item.name for item in inputs}:
        print(f"note: {len(unused)} of the entries of {arguments.captions} are of other images", file=sys.stderr)
    scorer = BatchScorer(choose_model(arguments), arguments)
    summary = Summary(len(inputs))
    found: list[float] = []
    with GrowingJson(output) as results:
        for batch in read_batches(
            inputs, scorer.pipeline.image_processor, arguments.batch_size, summary, scorer.image_size
        ):
            rows = scorer.score(batch, [texts[name] for name in batch.names], summary)
            scored = {name: row for name, row in zip(batch.names, rows, strict=True) if row is not None}
            results.add({name: row if isinstance(entries[name], list) else row[0] for name, row in scored.items()})
            found += [score for row in scored.values() for score in row]
            summary.done += len(scored)
            summary.advance(len(batch.inputs))  # also those whose scores failed
    scorer.print_notes()
    if found:
        better = sum(score > 0 for score in found)
        print(
            f"{len(found)} captions: mean score {statistics.fmean(found):.4f}, lowest {min(found):.4f}; "
            f"{better} explain more than no words"
        )
    return summary.close("scored", str(output))


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
