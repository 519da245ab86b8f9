"""`vlv encode`: images to caption embeddings."""

import argparse
import time

import torch
from safetensors.torch import save_file

from vlv import hub
from vlv.files import write_atomically

from .caption import batches, positive
from .errors import UserError
from .inputs import collect_images
from .models import add_model_arguments, choose_device, choose_model, loading, output_path, precision
from .output import Summary


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "encode",
        help="write caption embeddings of images",
        description="Writes caption embeddings, one tensor (tokens, width) for each image under its path relative "
        "to the argument. `vlv caption --embeddings` and `vlv reconstruct --embeddings` read them.",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="image files and folders")
    parser.add_argument("--output", default="z.safetensors", help="the safetensors file (default: z.safetensors)")
    parser.add_argument("--batch-size", type=positive, default=8, help="images at once (default: 8)")
    parser.add_argument(
        "--for",
        dest="use",
        choices=("caption", "reconstruct"),
        help="what the embeddings are for; needed with a model of two encoders, such as `vlv convert` makes of both "
        "stages of the authors' code",
    )
    add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    output = output_path(arguments.output, ".safetensors")
    images = collect_images(arguments.paths)
    source = choose_model(arguments)
    with loading(source):
        two = hub.has_two_encoders(hub.resolve(source, revision=arguments.revision, allow_patterns=["*.json"]))
        if two and arguments.use is None:
            raise UserError(
                f"{source} has two encoders, one for captions and one for reconstructions, and neither reads the "
                "other's embeddings: pass --for caption or --for reconstruct"
            )
        model, image_processor = hub.load_encoder(
            source,
            revision=arguments.revision,
            dtype=precision(arguments),
            device=choose_device(arguments),
            for_captions=arguments.use == "caption",
        )
    metadata = {"model": source} | ({"for": arguments.use} if two else {})
    summary = Summary()
    embeddings: dict[str, torch.Tensor] = {}
    written, next_write = 0, 0.0

    def write() -> None:
        write_atomically(output, lambda path: save_file(embeddings, path, metadata=metadata))

    try:
        for names, batch in batches(images, image_processor, arguments.batch_size, summary):
            with torch.no_grad():
                rows = model.get_caption_embeds(batch["pixel_values"].to(model.device, model.dtype))
            embeddings |= {name: row.cpu().contiguous().clone() for name, row in zip(names, rows, strict=True)}
            summary.done += len(names)
            if time.monotonic() >= next_write:  # as results come, but not more than a twentieth of the time
                start = time.monotonic()
                write()
                written, next_write = summary.done, time.monotonic() + 20 * (time.monotonic() - start)
    finally:  # an interrupted run keeps what is done
        if summary.done > written:
            write()
    return summary.close("encoded", str(output))
