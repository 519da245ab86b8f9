"""`vlv reconstruct`: reconstructions of images, or of their caption embeddings, with metrics."""

import argparse
import dataclasses
import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import make_image_grid
from PIL import Image

from vlv.evaluation import EncoderFeatures, SetMeter, image_metrics, inception_is_available
from vlv.files import write_atomically
from vlv.pipelines import ReconstructionPipeline, generate_images, load_reconstruction

from .batches import read_batches
from .captions import read_one_text
from .encode import encode
from .errors import UserError
from .inputs import collect_images, load_embeddings
from .models import choose_device, choose_model, loading, precision
from .output import GrowingJson, Summary, output_path, refuse_existing, require_writable
from .sheet import Pair, contact_sheet

# Errors of one output name. Others, such as a full disk, concern the whole run.
ERRORS_OF_NAMES = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.EISDIR, errno.ENOTDIR, errno.EEXIST)

FOLDERS = ("reconstructions", "side_by_side")


def run(arguments: argparse.Namespace) -> int:
    if bool(arguments.paths) == bool(arguments.embeddings):
        raise UserError("give image paths or --embeddings FILE, and not both")
    folder = Path(arguments.output_dir)
    for part in (folder, *(folder / name for name in FOLDERS)):
        require_writable(part, "--output-dir", arguments.output_dir)
    if (folder / "metrics.json").is_dir():
        raise UserError(f"--output-dir {folder} cannot be used: {folder / 'metrics.json'} is a folder")
    sheet = output_path(arguments.sheet, ".png", "--sheet") if arguments.sheet else None
    if not arguments.overwrite:
        for path in (folder / "metrics.json", *(p for name in FOLDERS for p in (folder / name).glob("*"))):
            refuse_existing(path, "--output-dir")
        if sheet is not None:
            refuse_existing(sheet, "--sheet")
    inputs = collect_images(arguments.paths) if arguments.paths else []
    captions = read_one_text(arguments.captions, "--captions") if arguments.captions else {}
    source = choose_model(arguments)
    with loading(source):
        pipeline = load_reconstruction(
            source, revision=arguments.revision, dtype=precision(arguments), device=choose_device(arguments)
        )
    pipeline.set_progress_bar_config(disable=True)  # the summary shows one bar for all images
    if arguments.embeddings:
        width = pipeline.encoder.config.caption_embed_dim
        inputs = load_embeddings(arguments.embeddings, width, "reconstruct")
    else:
        config = pipeline.encoder.config
        try:
            add_words(pipeline, torch.zeros(1, config.num_query_tokens, config.caption_embed_dim), arguments)
        except ValueError as error:
            raise UserError(f"--prompt and --image-tokens do not fit the model: {error}") from error
    size = arguments.image_size or pipeline.default_size
    if size % pipeline.size_multiple:
        raise UserError(f"--image-size {size} must be divisible by {pipeline.size_multiple}")

    summary, meter = Summary(len(inputs)), _set_meter(pipeline)
    pairs: list[Pair] = []
    with GrowingJson(folder / "metrics.json", head={"settings": _settings(arguments, source, size)}) as report:
        for batch in read_batches(inputs, pipeline.image_processor, arguments.batch_size, summary, size):
            metrics: dict[str, dict[str, float]] = {}
            try:
                caption_embeds = add_words(pipeline, encode(pipeline.encoder, batch), arguments)
            except ValueError as error:  # embeddings of a file may be of any number
                for name in batch.names:
                    summary.fail(name, str(error), "reconstruct")
                continue
            reconstructions = reconstruct(pipeline, caption_embeds, size, arguments, summary)
            for name, original, reconstruction in zip(batch.names, batch.originals, reconstructions, strict=True):
                try:
                    metrics[name] = _write(folder, name, original, reconstruction)
                except OSError as error:
                    if error.errno not in ERRORS_OF_NAMES:
                        raise
                    summary.fail(name, str(error), "write the reconstruction of")
                    continue
                summary.done += 1
                if original is not None:
                    if meter is not None:
                        meter.update(_to_tensor(reconstruction)[None], _to_tensor(original)[None])
                    if sheet is not None:
                        pairs.append(Pair(original, reconstruction, captions.get(name, "")))
            report.add(metrics)
        report.close({"dataset": _dataset_metrics(meter), "failed": summary.failed})
    if sheet is not None and pairs:
        write_atomically(sheet, contact_sheet(pairs).save)
    return summary.close("reconstructed", str(folder))


def add_words(
    pipeline: ReconstructionPipeline, caption_embeds: torch.Tensor, arguments: argparse.Namespace
) -> torch.Tensor:
    """Caption embeddings `(B, N, d_text)` with the words of `--prompt`, of which `--image-tokens` are kept.

    Raises:
        ValueError: If they do not fit the model.
    """
    return pipeline.add_prompt(caption_embeds, arguments.prompt, arguments.image_tokens, arguments.prompt_first)


def reconstruct(
    pipeline: ReconstructionPipeline,
    caption_embeds: torch.Tensor,
    size: int,
    arguments: argparse.Namespace,
    summary: Summary,
) -> list[Image.Image]:
    """Images of one batch, `size` pixels wide and high. `summary` shows the progress.

    Args:
        caption_embeds: `(B, N, d_text)`, with the words beside them.
    """
    count = len(caption_embeds)

    def advance(pipeline: Any, step: int, timestep: Any, tensors: dict) -> dict:
        summary.advance(count / len(pipeline.scheduler.timesteps))
        return {}

    images = generate_images(
        pipeline,
        caption_embeds=caption_embeds,
        seeds=[arguments.seed] * count,
        height=size,
        width=size,
        guidance_scale=arguments.guidance_scale,
        num_inference_steps=arguments.num_inference_steps,
        negative_prompt=arguments.negative_prompt,
        callback_on_step_end=advance,
    )  # (B, 3, size, size) in 0..1
    pixels = (images.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
    return [Image.fromarray(image) for image in pixels]


def _to_tensor(image: Image.Image) -> torch.Tensor:
    """uint8 `(3, H, W)`."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def _settings(arguments: argparse.Namespace, source: str, size: int) -> dict[str, Any]:
    """Settings as metrics.json records them."""
    names = ["guidance_scale", "num_inference_steps", "seed", "prompt", "prompt_first", "image_tokens"]
    names += ["negative_prompt", "revision", "dtype"]
    model = "embedded miniature" if arguments.model is None else source
    return {"model": model, "image_size": size, **{name: getattr(arguments, name) for name in names}}


def output_name(name: str) -> str:
    """The path of an image's reconstruction in the output folder; `a.jpg` and `a.png` have different ones.

    A name that the suffix makes longer than file systems allow (255 bytes) is shortened, with a hash of the whole.
    """
    *folders, last = ["_" if part == ".." else part for part in Path(name).parts if part != "/"]
    encoded = os.fsencode(last)
    if len(encoded) > 251:
        stem = encoded[:200].decode("utf-8", "ignore")
        last = f"{stem}-{hashlib.blake2b(encoded, digest_size=8).hexdigest()}"
    return Path(*folders, last + ".png").as_posix()


def _write(folder: Path, name: str, original: Image.Image | None, reconstruction: Image.Image) -> dict[str, float]:
    """Writes a reconstruction, and with its original also the two side by side; returns its metrics."""
    file = output_name(name)
    write_atomically(folder / FOLDERS[0] / file, reconstruction.save)
    if original is None:
        return {}
    write_atomically(folder / FOLDERS[1] / file, make_image_grid([original, reconstruction], rows=1, cols=2).save)
    try:
        return image_metrics(_to_tensor(reconstruction) / 255, _to_tensor(original) / 255)
    except ImportError:  # metrics.json names the missing extra once, see _dataset_metrics
        return {}


def _set_meter(pipeline: ReconstructionPipeline) -> SetMeter | None:
    """The meter of FID and KID; None without the extra vlv[eval]."""
    try:
        if inception_is_available():
            return SetMeter()
        features = EncoderFeatures(pipeline.encoder, pipeline.image_processor)
        return SetMeter(features, "this VLV's mean image token (Inception is not available)")
    except ImportError:
        return None


def _dataset_metrics(meter: SetMeter | None) -> dict[str, Any]:
    """FID and KID of all images together, or a note on the missing extra."""
    if meter is None:
        return {"note": "metrics need the extra vlv[eval] (pip install '.[eval]' in its source folder)"}
    return dataclasses.asdict(meter.compute())
