"""`vlv caption`: captions of images, or of their caption embeddings."""

import argparse
import sys
from dataclasses import fields
from functools import partial
from typing import Any

import torch

from vlv import VLVConfig, VLVForConditionalGeneration, VLVProcessor, hub
from vlv.captioning.ahead import choose_num_workers, ended_readers
from vlv.captioning.captioner import Captioner, CaptionSettings
from vlv.captioning.encoding import open_embeddings_cache, read_encoded_batches
from vlv.captioning.inputs import collect_images, load_embeddings
from vlv.captioning.output import Summary, output_path, refuse_existing
from vlv.captioning.resume import ResumableResults, record_path
from vlv.errors import UserError

from . import caption_shards
from .choosing import (
    choose_captions,
    choose_min_score,
    complete_choice_arguments,
    recorded_choice,
    refuse_other_form,
    shared_settings,
    text_to_image_fingerprint,
    uses_scores,
)
from .models import choose_device, choose_model, loading, precision

ENCODER_BATCH_SIZE = 8


def run(arguments: argparse.Namespace) -> int:
    if caption_shards.is_wanted(arguments):
        return caption_shards.run(arguments)
    if bool(arguments.paths) == bool(arguments.embeddings):
        raise UserError("give image paths or --embeddings FILE, and not both")
    for option, value in (
        ("--embeddings-cache", arguments.embeddings_cache),
        ("--encoder-batch-size", arguments.encoder_batch_size),
    ):
        if arguments.embeddings and value is not None:
            raise UserError(f"{option} is for images, which --embeddings replaces; leave one out")
    complete_choice_arguments(arguments)
    output = output_path(arguments.output, ".json")
    if record_path(output).is_dir():
        raise UserError(f"{record_path(output)} is a folder; pass another --output")
    if not (arguments.resume or arguments.overwrite):
        refuse_existing(output, "--output", resumable=True)
    inputs = collect_images(arguments.paths) if arguments.paths else []
    source = choose_model(arguments)
    with loading(source):
        folder = hub.resolve(source, revision=arguments.revision, allow_patterns=hub.CAPTIONER_FILES)
        fingerprint = hub.fingerprint(folder, hub.CAPTIONER_FINGERPRINT)
        if arguments.embeddings:
            config = VLVConfig.from_dict(hub.read_config(folder))
            inputs = load_embeddings(arguments.embeddings, config.caption_embed_dim, "caption")
    settings = CaptionSettings(**{field.name: getattr(arguments, field.name) for field in fields(CaptionSettings)})
    recorded = settings.recorded() | {"dtype": arguments.dtype} | recorded_choice(arguments)
    choose_min_score(arguments, source)
    if uses_scores(arguments):
        with loading(source):
            recorded["text_to_image"] = text_to_image_fingerprint(source, arguments.revision)
    results = ResumableResults(output, (source, fingerprint), recorded, shared_settings(arguments))
    total, kept = len(inputs), None
    if arguments.resume and output.exists():
        refuse_other_form(output, arguments)
        inputs = results.resume(inputs)
        kept = total - len(inputs)
        if arguments.confidence:
            from vlv.pipelines import mark_confidence  # it imports diffusers, which captions alone do not need

            results.revise(partial(mark_confidence, min_score=arguments.min_score))
        for note in results.notes():
            print(note, file=sys.stderr)
    with loading(source):
        model, processor = hub.load_captioner(folder, dtype=precision(arguments), device=choose_device(arguments))
    if arguments.prompt:
        check_prompt(arguments.prompt, source, model, processor)
    scorer = None
    if uses_scores(arguments):
        from .scoring import BatchScorer  # it loads diffusers, which captions alone do not need

        scorer = BatchScorer(source, arguments)
    size = None if scorer is None else scorer.image_size
    summary = Summary(len(inputs))
    captioner = Captioner(model, processor, settings)
    encoder: Any = model.model
    cache = open_embeddings_cache(arguments.embeddings_cache, encoder, processor.image_processor)
    with results, ended_readers():
        for batch in read_encoded_batches(
            *(inputs, encoder, processor.image_processor, arguments.batch_size, summary, size, True),
            encoder_batch_size=arguments.encoder_batch_size or ENCODER_BATCH_SIZE,
            cache=cache,
            num_workers=choose_num_workers(arguments.num_workers, len(inputs)),
        ):
            done, entries = choose_captions(captioner.caption(batch), batch, scorer, arguments, summary)
            results.add(done, entries)
            summary.done += len(done)
            summary.advance(len(batch.inputs))
    if scorer is not None:
        scorer.print_notes()
    return summary.close("captioned", str(output), kept)


def check_prompt(prompt: str, source: str, model: VLVForConditionalGeneration, processor: VLVProcessor) -> None:
    """Says if the model was not trained to follow an instruction.

    Raises:
        UserError: If the instruction is longer than the language model can read.
    """
    embeds = torch.zeros(1, model.config.num_query_tokens, model.config.caption_embed_dim)
    try:
        model.get_prefix(
            caption_embeds=embeds.to(model.device, model.dtype), **processor(text=prompt).to(model.device)
        )
    except ValueError as error:
        raise UserError(f"--prompt: {error}") from error
    known = model.config.instructions or []
    if prompt not in known:
        reason = f"was trained to follow {', '.join(map(repr, known))}" if known else "records no instructions"
        print(f"note: {source} {reason}; it reads {prompt!r} as the beginning of captions", file=sys.stderr)
