"""`vlv caption`: captions of images, or of their caption embeddings."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from vlv import hub
from vlv.pipelines import generate_captions, trim_caption

from .batches import read_batches
from .errors import UserError
from .inputs import collect_images, load_embeddings, positive
from .models import add_model_arguments, choose_device, choose_model, loading, output_path, precision
from .output import IncrementalJson, Summary

AS_ORIGINAL = {"num_beams": 4, "early_stopping": True, "max_new_tokens": 300, "prefix_dtype": torch.bfloat16}


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "caption",
        help="write captions of images",
        description="Writes captions of images as JSON: {path relative to the argument: caption}. Folders are "
        "searched recursively. The file is updated during the run. An image that cannot be read is named on standard "
        "error, the other images are captioned, and the exit code is 1.",
    )
    parser.add_argument("paths", nargs="*", metavar="PATH", help="image files and folders")
    parser.add_argument("--embeddings", metavar="FILE", help="caption embeddings from `vlv encode`, instead of images")
    parser.add_argument("--output", default="captions.json", help="the JSON file (default: captions.json)")
    parser.add_argument("--resume", action="store_true", help="keep the captions that are in --output already")
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
    add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if bool(arguments.paths) == bool(arguments.embeddings):
        raise UserError("give image paths or --embeddings FILE, and not both")
    output = output_path(arguments.output, ".json")
    inputs = collect_images(arguments.paths) if arguments.paths else []
    finished = read_captions(output, "--resume") if arguments.resume and output.exists() else {}
    source = choose_model(arguments)
    with loading(source):
        model, processor = hub.load_captioner(
            source, revision=arguments.revision, dtype=precision(arguments), device=choose_device(arguments)
        )
    if arguments.embeddings:
        inputs = load_embeddings(arguments.embeddings, model.config.text_encoder_config.hidden_size, "caption")
    inputs = [item for item in inputs if item.name not in finished]
    settings: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "num_beams": arguments.num_beams}
    if arguments.as_original:
        settings |= AS_ORIGINAL
    summary = Summary(len(inputs))
    with IncrementalJson(output, finished) as results:
        for batch in read_batches(inputs, processor.image_processor, arguments.batch_size, summary):
            captions = generate_captions(model, processor, **batch.tensors, **settings)
            if arguments.trim or arguments.as_original:
                captions = [trim_caption(caption) for caption in captions]
            results.save(dict(zip(batch.names, captions, strict=True)))
            summary.done += len(captions)
            summary.advance(len(captions))
    return summary.close("captioned", str(output))


def read_captions(path: str | Path, option: str) -> dict[str, str]:
    """Captions as `vlv caption` writes them: `{name: caption}`.

    Args:
        option: The option that gave the path, for the message.

    Raises:
        UserError: If the file cannot be read or does not hold a JSON object.
    """
    try:
        captions = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{option}: {path} cannot be read as JSON: {error}") from error
    if not isinstance(captions, dict):
        raise UserError(f"{option}: {path} does not hold {{name: caption}}, as `vlv caption` writes it")
    return captions
