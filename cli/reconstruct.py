"""`vlv reconstruct`: images, or their embeddings, to pictures of what was understood."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlv.evaluation import EncoderFeatures, SetMeter, image_metrics, inception_is_available
from vlv.files import write_atomically
from vlv.pipelines import VLVReconstructionPipeline, load_reconstruction

from .caption import positive
from .errors import UserError
from .inputs import Input, collect_images, load_embeddings
from .models import add_model_arguments, choose_device, choose_model, loading, output_path, precision
from .output import IncrementalJson, Summary
from .sheet import Pair, contact_sheet


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "reconstruct",
        help="draw images anew from their caption embeddings",
        description="Writes OUTPUT_DIR/reconstructions/, OUTPUT_DIR/side_by_side/ (original and "
        "reconstruction) and OUTPUT_DIR/metrics.json. Each picture has the seed to itself, so it does not "
        "depend on the others.",
    )
    parser.add_argument("paths", nargs="*", metavar="PATH", help="image files and folders")
    parser.add_argument("--embeddings", metavar="FILE", help="caption embeddings from `vlv encode` instead of images")
    parser.add_argument("--output-dir", default="reconstructions", help="a folder (default: reconstructions)")
    parser.add_argument("--sheet", metavar="FILE.png", help="also one picture: originals above their reconstructions")
    parser.add_argument("--captions", metavar="FILE", help="captions from `vlv caption`, to be written on the sheet")
    parser.add_argument("--guidance-scale", type=float, default=2.0, help="1 is no guidance (default: 2.0)")
    parser.add_argument("--num-inference-steps", type=positive, default=50, help="denoising steps (default: 50)")
    parser.add_argument("--seed", type=int, default=42, help="of every picture's noise (default: 42)")
    parser.add_argument(
        "--image-size", type=positive, help="pixels, both ways; by default what the model was trained for"
    )
    parser.add_argument("--negative-prompt", help="words to steer away from")
    parser.add_argument("--batch-size", type=positive, default=8, help="pictures at once (default: 8)")
    add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if bool(arguments.paths) == bool(arguments.embeddings):
        raise UserError("give image paths or --embeddings FILE, and not both")
    images = collect_images(arguments.paths) if arguments.paths else []
    source = choose_model(arguments)
    with loading(source):
        pipeline = load_reconstruction(
            source, revision=arguments.revision, dtype=precision(arguments), device=choose_device(arguments)
        )
    pipeline.set_progress_bar_config(disable=not sys.stderr.isatty())
    if arguments.embeddings:
        width = pipeline.encoder.config.text_encoder_config.hidden_size
        images = load_embeddings(arguments.embeddings, width, "reconstruct")
    size = arguments.image_size or pipeline.default_size
    if size % pipeline.vae_scale_factor:
        raise UserError(f"--image-size {size} must be divisible by {pipeline.vae_scale_factor}")

    sheet = output_path(arguments.sheet, ".png") if arguments.sheet else None
    folder, summary = Path(arguments.output_dir), Summary()
    meter = _meter(pipeline)
    captions = read_captions(arguments.captions) if arguments.captions else {}
    on_sheet: list[Pair] = []
    with IncrementalJson(folder / "metrics.json", {"settings": _settings(arguments, source, size)}) as report:
        per_image: dict[str, Any] = {}
        for batch in _readable_batches(images, pipeline, size, arguments.batch_size, summary):
            drawn = [_to_image(picture) for picture in draw(pipeline, [item for item, _ in batch], size, arguments)]
            for (item, original), picture in zip(batch, drawn, strict=True):
                per_image[item.name] = _write(folder, item, original, picture)
                summary.done += 1
                if original is not None:
                    if meter is not None:
                        meter.update(_to_bytes(picture), _to_bytes(original))
                    if sheet is not None:
                        on_sheet.append(Pair(original, picture, captions.get(item.name, "")))
            report.save({"pictures": per_image, "failed": summary.failed})
        report.save({"set": _set_metrics(meter), "failed": summary.failed})
    if sheet is not None and on_sheet:
        write_atomically(sheet, contact_sheet(on_sheet).save)
    return summary.close("reconstructed", str(folder))


def read_captions(path: str) -> dict[str, str]:
    """What `vlv caption` wrote."""
    try:
        captions = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--captions {path} cannot be read: {error}") from error
    if not isinstance(captions, dict):
        raise UserError(f"--captions {path}: expected {{name: caption}}, as `vlv caption` writes")
    return captions


def draw(
    pipeline: VLVReconstructionPipeline, items: list[Input], size: int, arguments: argparse.Namespace
) -> torch.Tensor:
    """Pictures `(B, 3, size, size)` in 0..1."""
    if items[0].embeds is not None:
        source: dict[str, Any] = {
            "caption_embeds": torch.stack([item.embeds for item in items if item.embeds is not None])
        }
    else:
        source = {"image": [item.path for item in items]}
    return (
        pipeline(
            **source,
            height=size,
            width=size,
            guidance_scale=arguments.guidance_scale,
            num_inference_steps=arguments.num_inference_steps,
            negative_prompt=arguments.negative_prompt,
            generator=[torch.Generator().manual_seed(arguments.seed) for _ in items],
            output_type="pt",
        )
        .images.float()
        .cpu()
    )


def _to_image(picture: torch.Tensor) -> Image.Image:
    return Image.fromarray((picture.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))


def _to_bytes(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None]  # (1, 3, H, W)


def _settings(arguments: argparse.Namespace, source: str, size: int) -> dict[str, Any]:
    names = ("guidance_scale", "num_inference_steps", "seed", "negative_prompt", "revision", "dtype")
    model = "embedded miniature" if arguments.model is None else source
    return {"model": model, "image_size": size, **{name: getattr(arguments, name) for name in names}}


def _readable_batches(images, pipeline, size: int, batch_size: int, summary: Summary):
    """Lists of `(input, original as a square picture or None)`."""
    batch: list[tuple[Input, Image.Image | None]] = []
    for item in images:
        original = None
        if item.path is not None:
            try:
                original = pipeline.image_processor.load(item.path).resize((size, size), Image.Resampling.BICUBIC)
            except ValueError as error:
                summary.fail(item.name, str(error))
                continue
        if (
            batch
            and item.embeds is not None
            and batch[0][0].embeds is not None
            and item.embeds.shape != batch[0][0].embeds.shape
        ):
            yield batch
            batch = []
        batch.append((item, original))
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _write(folder: Path, item: Input, original: Image.Image | None, drawn: Image.Image) -> dict[str, Any]:
    parts = ["_" if part == ".." else part for part in Path(item.name).parts if part != "/"]
    name = Path(*parts).as_posix() + ".png"  # a.jpg and a.png may stand side by side
    write_atomically(folder / "reconstructions" / name, lambda path: drawn.save(path))
    if original is None:
        return {}
    pair = Image.new("RGB", (2 * original.width, original.height))
    pair.paste(original, (0, 0))
    pair.paste(drawn, (original.width, 0))
    write_atomically(folder / "side_by_side" / name, lambda path: pair.save(path))
    try:
        return image_metrics(_to_bytes(drawn)[0] / 255, _to_bytes(original)[0] / 255)
    except ImportError:
        return {}


def _meter(pipeline: VLVReconstructionPipeline) -> SetMeter | None:
    try:
        if inception_is_available():
            return SetMeter()
        features = EncoderFeatures(pipeline.encoder, pipeline.image_processor)
        return SetMeter(features, "this VLV's mean image token (Inception is not at hand)")
    except ImportError:
        return None


def _set_metrics(meter: SetMeter | None) -> dict[str, Any]:
    if meter is None:
        return {"note": "metrics need the extra vlv[eval] (pip install '.[eval]' in its source folder)"}
    return dataclasses.asdict(meter.compute())
