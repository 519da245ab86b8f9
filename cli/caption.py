"""`vlv caption`: captions of images, or of their caption embeddings."""

import argparse
import hashlib
import sys
from functools import partial
from typing import Any

import torch

from vlv import VLVConfig, VLVForConditionalGeneration, VLVProcessor, hub
from vlv.pipelines import generate_captions, mark_confidence, trim_caption

from .batches import Batch, read_batches
from .choosing import (
    add_choice_arguments,
    choose_captions,
    choose_min_score,
    complete_choice_arguments,
    recorded_choice,
    refuse_other_form,
    shared_settings,
    text_to_image_fingerprint,
    uses_scores,
)
from .errors import UserError
from .inputs import collect_images, load_embeddings, positive
from .models import add_model_arguments, choose_device, choose_model, loading, precision
from .output import Summary, output_path, refuse_existing
from .resume import ResumableResults, record_path
from .scoring import BatchScorer

AS_ORIGINAL = {"num_beams": 4, "early_stopping": True, "max_new_tokens": 300, "prefix_dtype": torch.bfloat16}


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "caption",
        help="write captions of images",
        description="Writes captions of images as JSON: {path relative to the argument: caption}. Folders are "
        "searched recursively. The file is complete JSON at every moment. An image that cannot be read is named on "
        "standard error, the other images are captioned, and the exit code is 1. A file beside the output, such as "
        "captions.resume.jsonl, records what --resume goes on with.",
    )
    parser.add_argument("paths", nargs="*", metavar="PATH", help="image files and folders")
    parser.add_argument("--embeddings", metavar="FILE", help="caption embeddings from `vlv encode`, instead of images")
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help='instruction to a model that was trained to follow it, such as "as tags" (`vlv info` lists them); other '
        "words are the beginning of the captions",
    )
    parser.add_argument("--output", default="captions.json", help="the JSON file (default: captions.json)")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        action="store_true",
        help="go on with --output: keep the captions of images that have not changed, add the others",
    )
    existing.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    parser.add_argument("--batch-size", type=positive, default=8, help="images in a batch (default: 8)")
    parser.add_argument(
        "--max-new-tokens", type=positive, default=300, help="most tokens of a caption (default: 300, as the paper)"
    )
    parser.add_argument("--num-beams", type=positive, default=1, help="beams; 1 is greedy (default: 1)")
    parser.add_argument("--trim", action="store_true", help="remove an unfinished last sentence and repetitions")
    parser.add_argument(
        "--as-original",
        action="store_true",
        help="settings of the authors' Caption_inference.py: 4 beams, at most 300 tokens, the prefix rounded to "
        "bfloat16, --trim (docs/from_the_original.md)",
    )
    add_choice_arguments(parser)
    add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if bool(arguments.paths) == bool(arguments.embeddings):
        raise UserError("give image paths or --embeddings FILE, and not both")
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
    settings: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "num_beams": arguments.num_beams}
    if arguments.as_original:
        settings |= AS_ORIGINAL
    trim = arguments.trim or arguments.as_original
    recorded = {name: str(value) for name, value in settings.items()} | {"trim": trim, "dtype": arguments.dtype}
    if arguments.prompt:
        recorded["prompt"] = arguments.prompt
    recorded |= recorded_choice(arguments)
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
            results.revise(partial(mark_confidence, min_score=arguments.min_score))
        for note in results.notes():
            print(note, file=sys.stderr)
    with loading(source):
        model, processor = hub.load_captioner(folder, dtype=precision(arguments), device=choose_device(arguments))
    if arguments.prompt:
        check_prompt(arguments.prompt, source, model, processor)
    scorer = BatchScorer(source, arguments) if uses_scores(arguments) else None
    size = None if scorer is None else scorer.image_size
    summary = Summary(len(inputs))
    with results:
        for batch in read_batches(inputs, processor.image_processor, arguments.batch_size, summary, size, True):
            groups = generate_groups(model, processor, batch, arguments, settings)
            if trim:
                groups = [[trim_caption(caption) for caption in own] for own in groups]
            done, entries = choose_captions(groups, batch, scorer, arguments, summary)
            results.add(done, entries)
            summary.done += len(done)
            summary.advance(len(batch.inputs))
    if scorer is not None:
        scorer.print_notes()
    return summary.close("captioned", str(output), kept)


def generate_groups(
    model: VLVForConditionalGeneration,
    processor: VLVProcessor,
    batch: Batch,
    arguments: argparse.Namespace,
    settings: dict[str, Any],
) -> list[list[str]]:
    """The captions of each input of a batch: one, or `--num-captions` samples.

    The samples depend on the content of the input and on `--seed`, and not on the batch.
    """
    if arguments.num_captions == 1:
        captions = generate_captions(model, processor, **batch.tensors, text=arguments.prompt, **settings)
        return [[caption] for caption in captions]
    sampling = {
        "do_sample": True,
        "temperature": arguments.temperature,
        "num_return_sequences": arguments.num_captions,
    }
    groups = []
    for place, item in enumerate(batch.inputs):
        content = (item.identity or {}).get("blake2b") or item.name  # of a pipe, the name
        digest = hashlib.blake2b(f"{arguments.seed}/{content}".encode(), digest_size=8).digest()
        tensors = {name: rows[place : place + 1] for name, rows in batch.tensors.items()}
        torch.manual_seed(int.from_bytes(digest))
        groups.append(generate_captions(model, processor, **tensors, text=arguments.prompt, **settings, **sampling))
    return groups


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
