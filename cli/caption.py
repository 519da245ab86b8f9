"""`vlv caption`: images, or their embeddings, to captions."""

import argparse
import json
from collections.abc import Iterator
from typing import Any

import torch

from vlv import VLVForConditionalGeneration, VLVImageProcessor, VLVProcessor, hub
from vlv.pipelines import trim_caption

from .errors import UserError
from .inputs import Input, collect_images, load_embeddings
from .models import add_model_arguments, choose_device, choose_model, loading, output_path, precision
from .output import IncrementalJson, Summary

AS_ORIGINAL = {"num_beams": 4, "early_stopping": True, "max_new_tokens": 300, "prefix_dtype": torch.bfloat16}


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "caption",
        help="write captions of images",
        description="Writes captions of images as JSON: {path relative to the argument: caption}. Folders are "
        "searched recursively. Results are on disk as they come; a file that cannot be read is named, the rest goes "
        "on, and the exit code is 1.",
    )
    parser.add_argument("paths", nargs="*", metavar="PATH", help="image files and folders")
    parser.add_argument("--embeddings", metavar="FILE", help="caption embeddings from `vlv encode` instead of images")
    parser.add_argument("--output", default="captions.json", help="the JSON file (default: captions.json)")
    parser.add_argument("--resume", action="store_true", help="keep the captions that --output holds already")
    parser.add_argument("--batch-size", type=positive, default=8, help="images at once (default: 8)")
    parser.add_argument(
        "--max-new-tokens", type=positive, default=300, help="longest caption (default: 300, the paper's)"
    )
    parser.add_argument("--num-beams", type=positive, default=1, help="beams; 1 is greedy (default: 1)")
    parser.add_argument("--trim", action="store_true", help="cut an unfinished end, leave out repetitions")
    parser.add_argument(
        "--as-original",
        action="store_true",
        help="as the authors' Caption_inference.py: 4 beams, at most 300 tokens, the prefix rounded to bfloat16, "
        "--trim (docs/from_the_original.md)",
    )
    add_model_arguments(parser)
    parser.set_defaults(run=run)


def positive(text: str) -> int:
    """An argparse type."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def run(arguments: argparse.Namespace) -> int:
    if bool(arguments.paths) == bool(arguments.embeddings):
        raise UserError("give image paths or --embeddings FILE, and not both")
    output = output_path(arguments.output, ".json")
    images = collect_images(arguments.paths) if arguments.paths else []
    finished = _finished(output) if arguments.resume else {}
    source = choose_model(arguments)
    with loading(source):
        model, processor = hub.load_captioner(
            source, revision=arguments.revision, dtype=precision(arguments), device=choose_device(arguments)
        )
    if arguments.embeddings:
        images = load_embeddings(arguments.embeddings, model.config.text_encoder_config.hidden_size, "caption")
    todo = [image for image in images if image.name not in finished]
    settings: dict[str, Any] = {
        "max_new_tokens": arguments.max_new_tokens,
        "num_beams": arguments.num_beams,
        "do_sample": False,
    }
    if arguments.as_original:
        settings |= AS_ORIGINAL
    summary = Summary()
    with IncrementalJson(output, finished) as results:
        for names, batch in batches(todo, processor.image_processor, arguments.batch_size, summary):
            captions = write_captions(model, processor, batch, settings)
            if arguments.trim or arguments.as_original:
                captions = [trim_caption(caption) for caption in captions]
            results.save(dict(zip(names, captions, strict=True)))
            summary.done += len(names)
    return summary.close("captioned", str(output))


def _finished(output) -> dict[str, str]:
    if not output.exists():
        return {}
    try:
        return dict(json.loads(output.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"--resume: {output} is not a JSON object of captions: {error}") from error


def batches(
    inputs: list[Input], image_processor: VLVImageProcessor, size: int, summary: Summary
) -> Iterator[tuple[list[str], dict[str, torch.Tensor]]]:
    """Names with `pixel_values` or `caption_embeds`, `size` at a time; what cannot be read is tallied and left out."""
    names: list[str] = []
    rows: list[torch.Tensor] = []
    key = "pixel_values"
    for item in inputs:
        if item.embeds is not None:
            key, row = "caption_embeds", item.embeds[None]
            if rows and rows[0].shape != row.shape:  # of another number of tokens
                yield names, {key: torch.cat(rows)}
                names, rows = [], []
        else:
            try:
                row = image_processor(item.path, return_tensors="pt").pixel_values
            except ValueError as error:
                summary.fail(item.name, str(error).removeprefix("image 0 of 1: "))
                continue
        names.append(item.name)
        rows.append(row)
        if len(rows) == size:
            yield names, {key: torch.cat(rows)}
            names, rows = [], []
    if rows:
        yield names, {key: torch.cat(rows)}


def write_captions(
    model: VLVForConditionalGeneration, processor: VLVProcessor, batch: dict[str, torch.Tensor], settings: dict
) -> list[str]:
    """Captions of one batch of `pixel_values` or `caption_embeds`."""
    placed: dict[str, Any] = {name: tensor.to(model.device, model.dtype) for name, tensor in batch.items()}
    ids = model.generate(**placed, **settings)
    return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
