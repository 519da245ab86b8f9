"""`vlv caption`: captions of images, or of their caption embeddings."""

import argparse
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlv import VLVConfig, hub
from vlv.captioning.acceleration import accelerate
from vlv.captioning.batches import Batch
from vlv.captioning.captioner import Captioner, CaptionSettings
from vlv.captioning.encoding import ENCODER_BATCH_SIZE, open_embeddings_cache, read_encoded_batches
from vlv.captioning.formats import has_results
from vlv.captioning.inputs import Input, load_embeddings
from vlv.captioning.output import Summary
from vlv.captioning.prefetch import worker_errors
from vlv.captioning.resume import ResumableResults, record_path, refuse_results
from vlv.captioning.texts import CaptionEditor, instruction_of_length
from vlv.errors import UserError

from . import caption_shards
from .caption_io import (
    adopt_written,
    caption_batch,
    check_arguments,
    check_first,
    choose_output,
    claim_kept,
    count_in_background,
    dry_run,
    open_caption_files,
    open_editor,
    open_inputs,
    open_template,
    write_files,
)
from .caption_job import check_prompt, recorded_settings, settings_of
from .choosing import (
    choose_captions,
    choose_min_score,
    complete_choice_arguments,
    refuse_other_form,
    shared_settings,
    text_to_image_fingerprint,
    uses_scores,
)
from .models import choose_device, choose_model, loading, precision

if TYPE_CHECKING:
    from .scoring import BatchScorer


def run(arguments: argparse.Namespace) -> int:
    if caption_shards.is_wanted(arguments):
        return caption_shards.run(arguments)
    arguments.resume = arguments.resume or arguments.resume_mixed
    check_arguments(arguments)
    complete_choice_arguments(arguments)
    output = choose_output(arguments)
    if output is not None:
        if record_path(output).is_dir():
            raise UserError(f"{record_path(output)} is a folder; pass another --output")
        if not (arguments.resume or arguments.overwrite):
            refuse_results(output)
    files, editor = open_caption_files(arguments), open_editor(arguments)
    found = None if arguments.embeddings else open_inputs(arguments)
    resumes = arguments.resume and output is not None and has_results(output)
    if found is not None and not resumes:
        if files is not None:
            check_first(files, found.first)
        if arguments.dry_run:
            return dry_run(found, files, output)
    source = choose_model(arguments)
    with loading(source):
        needed = ["config.json"] if arguments.dry_run else hub.CAPTIONER_FILES
        folder = hub.resolve(source, revision=arguments.revision, allow_patterns=needed)
        fingerprint = "" if output is None else hub.fingerprint(folder, hub.CAPTIONER_FINGERPRINT)
        config = VLVConfig.from_dict(hub.read_config(folder))
        if arguments.embeddings:
            embeddings = load_embeddings(arguments.embeddings, config.caption_embed_dim, "caption")
    inputs: Iterable[Input] = embeddings if found is None else found
    total = len(embeddings) if found is None else found.total
    if arguments.length:
        arguments.prompt = instruction_of_length(arguments.length, config.instructions, source)
    settings = settings_of(arguments)
    recorded = recorded_settings(arguments, settings, editor)
    choose_min_score(arguments, source)
    if uses_scores(arguments):
        with loading(source):
            recorded["text_to_image"] = text_to_image_fingerprint(source, arguments.revision)
    results, kept = None, None
    if output is not None:
        shared, mixes = shared_settings(arguments), arguments.resume_mixed
        results = ResumableResults(output, (source, fingerprint), recorded, shared, mixes)
        if resumes:
            refuse_other_form(output, arguments)
            listed = list(inputs)
            left = results.resume(listed)
            if files is not None:
                left = adopt_written(results, files, left)
                claim_kept(files, listed, left)
                check_first(files, left)
            inputs = left
            total, kept = len(left), len(listed) - len(left)
            if arguments.confidence:
                from vlv.pipelines import mark_confidence  # it imports diffusers, which captions alone do not need

                results.revise(partial(mark_confidence, min_score=arguments.min_score))
            for note in results.notes():
                print(note, file=sys.stderr)
    if arguments.dry_run:
        if results is not None:
            results.release()
        return dry_run(inputs, files, output, kept)
    summary = Summary(total, names_failures=False)
    if found is not None and kept is None:
        count_in_background(found, summary)
    selected = iter(inputs if files is None else files.select(inputs, summary))
    first = list(islice(selected, 1))
    scorer: Any = None
    with results or nullcontext(), worker_errors():
        if first:  # where every image is skipped, the model is not needed
            captioner = load(arguments, folder, source, settings, editor)
            if uses_scores(arguments):
                from .scoring import BatchScorer  # it loads diffusers, which captions alone do not need

                scorer = BatchScorer(source, arguments)
            for read in read_inputs(arguments, chain(first, selected), captioner, summary, scorer):
                for batch, groups in caption_batch(captioner, read, summary):
                    done, entries = choose_captions(groups, batch, scorer, arguments, summary)
                    entries = [editor.edit(entry) for entry in entries]
                    if results is not None:
                        results.put(done, entries)
                    if files is not None:
                        done = write_files(files, done, entries, summary)
                    if results is not None:
                        results.confirm(done)
                    summary.done += len(done)
                summary.advance(len(read.inputs))
    if scorer is not None:
        scorer.print_notes()
    summary.say(*editor.notes())
    place = output or arguments.sidecar_dir or ("image files" if arguments.metadata else "sidecars beside the images")
    return summary.close("captioned", str(place), kept, None if files is None else files.skipped)


def load(
    arguments: argparse.Namespace, folder: Path, source: str, settings: CaptionSettings, editor: CaptionEditor
) -> Captioner:
    """The model in a folder, as the command line asks for it. Raises `UserError` if that cannot be."""
    with loading(source):
        model, processor = hub.load_captioner(folder, dtype=precision(arguments), device=choose_device(arguments))
    if arguments.prompt:
        check_prompt(arguments.prompt, source, model, processor)
    cut = editor.cut if editor.loop_guard else None  # before captions are compared by their scores
    acceleration = accelerate(model, arguments.static_cache, arguments.compile)
    return Captioner(model, processor, settings, open_template(arguments.prompt), cut, acceleration)


def read_inputs(
    arguments: argparse.Namespace,
    inputs: Iterable[Input],
    captioner: Captioner,
    summary: Summary,
    scorer: "BatchScorer | None",
) -> Iterator[Batch]:
    """The inputs as batches of caption embeddings, with the images that a scorer needs."""
    encoder: Any = captioner.model.model
    image_processor, size = captioner.processor.image_processor, None if scorer is None else scorer.image_size
    return read_encoded_batches(
        *(inputs, encoder, image_processor, arguments.batch_size, summary, size, True),
        encoder_batch_size=arguments.encoder_batch_size or ENCODER_BATCH_SIZE,
        cache=open_embeddings_cache(arguments.embeddings_cache, encoder, image_processor),
        num_workers=arguments.num_workers,
    )
