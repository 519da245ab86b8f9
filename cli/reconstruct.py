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

from vlv.captioning.encoding import open_embeddings_cache, read_encoded_batches
from vlv.captioning.inputs import collect_images, load_embeddings
from vlv.captioning.output import GrowingJson, Summary, output_path, refuse_existing, require_writable
from vlv.errors import UserError
from vlv.evaluation import EncoderFeatures, SetMeter, image_metrics, inception_is_available
from vlv.files import write_atomically
from vlv.pipelines import ReconstructionPipeline, generate_images, load_reconstruction
from vlv.pipelines.schedulers import DEFAULT_STEPS, MANY_STEPS

from .captions import read_one_text
from .models import choose_device, choose_model, loading, precision, use_default_scheduler, use_scheduler
from .sheet import Pair, contact_sheet

# Errors of one output name. Others, such as a full disk, concern the whole run.
ERRORS_OF_NAMES = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.EISDIR, errno.ENOTDIR, errno.EEXIST)

FOLDERS = ("reconstructions", "side_by_side")


def run(arguments: argparse.Namespace) -> int:
    if bool(arguments.paths) == bool(arguments.embeddings):
        raise UserError("give image paths or --embeddings FILE, and not both")
    start, end = arguments.guidance_interval
    if not 0 <= start < end <= 1:
        raise UserError(f"--guidance-interval {start:g} {end:g} must be two ascending numbers from 0 to 1")
    if arguments.embeddings and arguments.embeddings_cache:
        raise UserError("--embeddings-cache is for images, which --embeddings replaces; leave one out")
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
    if arguments.scheduler is None:
        arguments.scheduler = use_default_scheduler(pipeline)
    else:
        use_scheduler(pipeline, arguments.scheduler)
    if arguments.num_inference_steps is None:
        arguments.num_inference_steps = DEFAULT_STEPS.get(arguments.scheduler, MANY_STEPS)
    pipeline.set_progress_bar_config(disable=True)  # the summary shows one bar for all images
    pipeline.keep_prompt()
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

    cache = open_embeddings_cache(arguments.embeddings_cache, pipeline.encoder, pipeline.image_processor)
    summary, meter = Summary(len(inputs)), None if arguments.no_metrics else _set_meter(pipeline)
    pairs: list[Pair] = []
    with GrowingJson(folder / "metrics.json", head={"settings": _settings(arguments, source, size)}) as report:
        for batch in read_encoded_batches(
            *(inputs, pipeline.encoder, pipeline.image_processor, arguments.batch_size, summary, size),
            encoder_batch_size=arguments.batch_size,
            cache=cache,
        ):
            metrics: dict[str, dict[str, float]] = {}
            try:
                caption_embeds = add_words(pipeline, batch.tensors["caption_embeds"], arguments)
            except ValueError as error:  # embeddings of a file may be of any number
                for name in batch.names:
                    summary.fail(name, str(error), "reconstruct")
                continue
            reconstructions = reconstruct(pipeline, caption_embeds, size, arguments, summary)
            compared: list[list[torch.Tensor]] = [[], []]  # reconstructions and their originals, (3, H, W) uint8
            for name, original, reconstruction in zip(batch.names, batch.originals, reconstructions, strict=True):
                try:
                    _write(folder, name, original, reconstruction)
                except OSError as error:
                    if error.errno not in ERRORS_OF_NAMES:
                        raise
                    summary.fail(name, str(error), "write the reconstruction of")
                    continue
                summary.done += 1
                metrics[name] = {}
                if original is None:
                    continue
                if meter is not None:
                    pair = [_to_tensor(image) for image in (reconstruction, original)]
                    metrics[name] = image_metrics(pair[0] / 255, pair[1] / 255)
                    for images, pixels in zip(compared, pair, strict=True):
                        images.append(pixels)
                if sheet is not None:
                    pairs.append(Pair(original, reconstruction, captions.get(name, "")))
            if meter is not None and compared[0]:
                meter.update(*map(torch.stack, compared))
            report.add(metrics)
        report.close({"dataset": _dataset_metrics(meter, arguments.no_metrics), "failed": summary.failed})
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
        guidance_interval=tuple(arguments.guidance_interval),
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
    names = [
        "guidance_scale",
        "guidance_interval",
        "num_inference_steps",
        "scheduler",
        "seed",
        "prompt",
        "prompt_first",
        "image_tokens",
    ]
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


def _write(folder: Path, name: str, original: Image.Image | None, reconstruction: Image.Image) -> None:
    """Writes a reconstruction, and with its original also the two side by side."""
    file = output_name(name)
    write_atomically(folder / FOLDERS[0] / file, reconstruction.save)
    if original is not None:
        grid = make_image_grid([original, reconstruction], rows=1, cols=2)
        write_atomically(folder / FOLDERS[1] / file, grid.save)


def _set_meter(pipeline: ReconstructionPipeline) -> SetMeter | None:
    """The meter of FID and KID; None without the extra vlv[eval]."""
    try:
        if inception_is_available():
            return SetMeter()
        features = EncoderFeatures(pipeline.encoder, pipeline.image_processor)
        return SetMeter(features, "this VLV's mean image token (Inception is not available)")
    except ImportError:
        return None


def _dataset_metrics(meter: SetMeter | None, left_out: bool) -> dict[str, Any]:
    """FID and KID of all images together, or a note on why there are none."""
    if left_out:
        return {"note": "left out (--no-metrics)"}
    if meter is None:
        return {"note": "metrics need the extra vlv[eval] (pip install '.[eval]' in its source folder)"}
    return dataclasses.asdict(meter.compute())
