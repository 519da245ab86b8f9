"""The paths that are compared: this library's way, the authors' method, and the floor, its bare modules.

A path is built once. Each of its ways is a function that does the same work and returns what can be compared.
"""

import io
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file

from vlv import hub
from vlv.cli.main import main as vlv
from vlv.diffusion_decoder import Conditioning
from vlv.pipelines import generate_captions, generate_images
from vlv.train import (
    Stage1Config,
    Stage1Trainer,
    Stage2Config,
    Stage2Trainer,
    freeze_for_stage1,
    freeze_for_stage2,
    load_images,
    load_pairs,
)
from vlv.train.caches import open_conditioning, open_moments, open_vision_features

from . import original
from .models import Models, build, write_files

BATCH = 4
"""Images of a training step and of a reconstruction."""
NEW_TOKENS = 64
SEED = 0


@dataclass
class Ways:
    """The ways of a path.

    Attributes:
        ours, original, floor: Each does the work of `images` images once.
        difference: The largest difference between the results of `ours` and `original`; raises `ValueError` if they
            are not the same. None where they need not be.
        aim: The ratio original / ours that is aimed at, at medium size.
        setting: What the path's row in the report says.
    """

    ours: Callable[[], Any]
    original: Callable[[], Any]
    floor: Callable[[], Any] | None
    images: int
    difference: Callable[[], float] | None = None
    aim: float | None = None
    setting: str = ""
    close: list[Callable[[], Any]] = field(default_factory=list)


def stage1(size: str, folder: Path, cached: bool = False) -> Ways:
    """A step of stage 1 from image files: reading, loss, backward pass, AdamW."""
    models = build(size)
    paths = write_files(folder / "images", 4 * BATCH, models)
    settings: dict[str, Any] = {}
    if cached:
        settings = {f"cache_{name}": str(folder / name) for name in ("moments", "vision_features")}
    config = Stage1Config(
        output_dir=str(folder / "run"), trainable="transformer", **_training_settings(models), **settings
    )
    encoder = models.captioner.model
    freeze_for_stage1(encoder, config.trainable)
    dataset, processor = load_images(str(folder / "images")), models.processor.image_processor
    vae: Any = models.decoder.vae
    image_encoder = models.decoder.image_encoder_parts()
    trainer = Stage1Trainer(
        encoder,
        models.decoder,
        config,
        dataset,
        processor,
        moments=open_moments(config, [dataset], processor, models.decoder),
        features=open_vision_features(config, [dataset], processor, encoder),
    )
    step, ready = _trainer_step(trainer)
    inputs = _tensors(next(ready))

    def bare_loss() -> torch.Tensor:
        names = ("pixel_values", "image_features")
        output = encoder(**{name: inputs[name] for name in names if name in inputs})
        if "moments" in inputs:
            latents = models.decoder.sample_latents(inputs["moments"].float())
        else:
            latents = models.decoder.encode_images(inputs["diffusion_pixels"].float() / 255 * 2 - 1)
        return models.decoder.denoise(latents, Conditioning.of(output)).loss

    def original_loss(files: Sequence[Path]) -> torch.Tensor:
        vae.encoder, vae.quant_conv = image_encoder  # a trainer with cached moments has removed them
        loss = original.stage1_loss(models, files, SEED)
        if cached:
            models.decoder.remove_image_encoder()
        return loss

    def difference() -> float:
        encoder.eval()
        torch.manual_seed(SEED)
        with torch.no_grad():
            ours = trainer.compute_loss(encoder, inputs)
            theirs = original_loss(paths[:BATCH])
        return _near(float(ours), float(theirs), 1e-5)

    batches = _in_turn(paths)
    return Ways(
        step,
        _bare_step(trainer, lambda: original_loss(next(batches))),
        _bare_step(trainer, bare_loss),
        BATCH,
        difference,
        1.7 if cached else 1.05,
        "moments and vision features cached, from the second epoch on" if cached else "first epoch",
    )


def stage2(size: str, folder: Path, cached: bool = False) -> Ways:
    """A step of stage 2 from files of images and captions; `cached`: the encoder is frozen, its conditioning kept."""
    models = build(size)
    paths = write_files(folder / "images", 4 * BATCH, models)
    settings: dict[str, Any] = {"trainable": "all"}
    if cached:
        settings = {"trainable": "projector+lm", "cache_conditioning": str(folder / "conditioning")}
        settings["conditioning_dtype"] = "float32"
    config = Stage2Config(output_dir=str(folder / "run"), **_training_settings(models), **settings)
    model, dataset = models.captioner, load_pairs(str(folder / "images"))
    freeze_for_stage2(model, config.trainable)
    conditioning = open_conditioning(config, [dataset], models.processor.image_processor, model.model)
    trainer = Stage2Trainer(model, config, dataset, models.processor, conditioning=conditioning)
    step, ready = _trainer_step(trainer)
    batch = _tensors(next(ready))

    def difference() -> float:
        model.eval()
        with torch.no_grad():
            ours = trainer.compute_loss(model, dict(batch))
            theirs = original.stage2_loss(models, paths[:BATCH])
        return _near(float(ours), float(theirs), 1e-5)

    batches = _in_turn(paths)
    return Ways(
        step,
        _bare_step(trainer, lambda: original.stage2_loss(models, next(batches))),
        _bare_step(trainer, lambda: model(**batch).loss),
        BATCH,
        difference,
        2.5 if cached else 1.6,
        "encoder frozen, its conditioning cached in float32"
        if cached
        else "encoder, projection and language model trained",
    )


def captions(
    size: str,
    folder: Path,
    *,
    num_beams: int = 1,
    count: int,
    original_batch_size: int,
    aim: float | None = None,
) -> Ways:
    """Captions of image files in one batch: reading, encoding, decoding, text."""
    models = build(size)
    paths = write_files(folder / "images", count, models)
    model, processor = models.captioner, models.processor
    settings: dict[str, Any] = {"max_new_tokens": NEW_TOKENS}
    if size != "miniature":  # its captions end by themselves; those of random weights are all of one length
        settings["min_new_tokens"] = NEW_TOKENS
    if num_beams > 1:
        settings["early_stopping"] = True
    pixel_values = processor(images=[str(path) for path in paths]).pixel_values

    def generate(pixels: torch.Tensor) -> list[str]:
        return generate_captions(model, processor, pixel_values=pixels, num_beams=num_beams, **settings)

    def ours() -> list[str]:
        return generate(processor(images=[str(path) for path in paths]).pixel_values)

    def theirs() -> list[str]:
        return original.captions(models, paths, num_beams, original_batch_size, **settings)

    return Ways(
        ours,
        theirs,
        lambda: generate(pixel_values),
        count,
        lambda: _equal_captions(ours(), theirs()),
        aim,
        f"{count} images in a batch, {f'{num_beams} beams' if num_beams > 1 else 'greedy'}; original: "
        + ("one at a time" if original_batch_size == 1 else f"in batches of {original_batch_size}"),
    )


def reconstruction(size: str, folder: Path, steps: int | None) -> Ways:
    """Reconstructions of image files in one batch; `steps` None: with the default sampler and its number of steps."""
    models = build(size)
    paths = write_files(folder / "images", BATCH, models)
    pipeline: Any = models.pipeline
    pipeline.set_progress_bar_config(disable=True)
    pipeline.keep_prompt()  # as `vlv reconstruct` does
    settings: dict[str, Any] = {"guidance_scale": original.GUIDANCE, "num_inference_steps": steps}
    if steps is None:
        from vlv.pipelines.schedulers import DEFAULT_SCHEDULER, DEFAULT_STEPS, build_scheduler

        pipeline.scheduler = build_scheduler(DEFAULT_SCHEDULER, pipeline.scheduler)
        settings["num_inference_steps"] = DEFAULT_STEPS[DEFAULT_SCHEDULER]
    else:
        pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)

    def ours() -> torch.Tensor:
        images = [str(path) for path in paths]
        return generate_images(pipeline, image=images, seeds=[SEED] * BATCH, **settings)

    def theirs() -> torch.Tensor:
        return original.reconstruct(models, paths, SEED)

    embeds = models.captioner.model(models.processor(images=[str(path) for path in paths]).pixel_values).caption_embeds

    def floor() -> None:
        """The passes of denoiser and autoencoder alone."""
        with torch.no_grad():
            conditioning = models.captioner.model(caption_embeds=embeds).conditioning
            side = models.image_size // pipeline.vae_scale_factor
            latents = torch.randn(2 * BATCH, pipeline.unet.config.in_channels, side, side)
            for _ in range(settings["num_inference_steps"]):
                pipeline.unet(latents, 500, torch.cat([conditioning] * 2))
            pipeline.vae.decode(latents[:BATCH])

    return Ways(
        ours,
        theirs,
        floor,
        BATCH,
        None if steps is None else lambda: _near_images(ours(), theirs()),
        2.5 if steps is None else 1.0,
        f"{settings['num_inference_steps']} steps of {type(pipeline.scheduler).__name__}, guidance 2",
    )


def preprocessing(size: str, folder: Path) -> Ways:
    """Image files to the encoder's input."""
    models = build(size)
    paths = write_files(folder / "images", 16, models)
    processor = models.processor.image_processor

    def ours() -> torch.Tensor:
        return processor([str(path) for path in paths], return_tensors="pt").pixel_values

    def theirs() -> torch.Tensor:
        return original.to_pixel_values(models, original.read_batch(models, paths))

    return Ways(ours, theirs, None, len(paths), lambda: _near_images(ours(), theirs()), 1.0, "16 files")


def loading(size: str, folder: Path) -> Ways:
    """A captioner from its folder; the authors' code also builds the diffusion model, and then deletes it."""
    models = build(size)
    saved = folder / "model"
    models.captioner.save_pretrained(saved)
    models.processor.save_pretrained(saved)
    models.pipeline.unet.save_pretrained(saved / "unet")
    models.pipeline.vae.save_pretrained(saved / "vae")

    def theirs() -> None:
        type(models.pipeline.unet).from_pretrained(saved / "unet")
        type(models.pipeline.vae).from_pretrained(saved / "vae")
        hub.load_captioner(saved)

    return Ways(
        lambda: hub.load_captioner(saved),
        theirs,
        lambda: [load_file(file) for file in saved.glob("*.safetensors")],
        1,
        setting="model and processor from a folder; the floor reads the weights alone",
    )


def bulk(size: str, folder: Path) -> Ways:
    """`vlv caption` of a folder, beside a loop over its files; each loads the model and writes JSON."""
    models = build(size)
    count, images, output = 32, folder / "images", folder / "captions.json"
    paths = write_files(images, count, models)
    saved = folder / "model"
    models.captioner.save_pretrained(saved)
    models.processor.save_pretrained(saved)
    image_size, pixel_values = models.image_size, models.processor(images=[str(path) for path in paths]).pixel_values
    del models

    def ours() -> dict[str, str]:
        options = ["--batch-size", "16", "--max-new-tokens", str(NEW_TOKENS), "--overwrite", "--output", str(output)]
        with redirect_stderr(io.StringIO()):
            vlv(["caption", str(images), "--model", str(saved), *options])
        return json.loads(output.read_text())

    def theirs() -> dict[str, str]:
        models: Any = SimpleNamespace(image_size=image_size)
        models.captioner, models.processor = hub.load_captioner(saved)
        found = original.captions(models, paths, 1, max_new_tokens=NEW_TOKENS)
        captions = {path.name: caption for path, caption in zip(paths, found, strict=True)}
        (folder / "original.json").write_text(json.dumps(captions))
        return captions

    def floor() -> None:
        model, processor = hub.load_captioner(saved)
        for pixels in pixel_values.split(16):
            generate_captions(model, processor, pixel_values=pixels, max_new_tokens=NEW_TOKENS)

    return Ways(
        ours,
        theirs,
        floor,
        count,
        lambda: _equal_captions(list(ours().values()), list(theirs().values())),
        setting=f"{count} files, greedy, batches of 16, with loading; original: one at a time",
    )


PATHS: dict[str, Callable[[str, Path], Ways]] = {
    "stage-1 step": stage1,
    "stage-1 step, cached": lambda size, folder: stage1(size, folder, cached=True),
    "stage-2 step": stage2,
    "stage-2 step, cached": lambda size, folder: stage2(size, folder, cached=True),
    "captions, beams": lambda size, folder: captions(
        size, folder, num_beams=4, count=16, original_batch_size=16, aim=1.45
    ),
    "captions, greedy": lambda size, folder: captions(size, folder, count=32, original_batch_size=1, aim=3.5),
    "captions, greedy, equal batches": lambda size, folder: captions(size, folder, count=32, original_batch_size=32),
    "reconstruction": lambda size, folder: reconstruction(size, folder, original.STEPS),
    "reconstruction, default sampler": lambda size, folder: reconstruction(size, folder, None),
    "preprocessing": preprocessing,
    "loading": loading,
    "bulk captions": bulk,
}


def open_path(name: str, size: str) -> Ways:
    """Builds a path in a temporary folder, which `close` removes."""
    folder = tempfile.TemporaryDirectory()
    ways = PATHS[name](size, Path(folder.name))
    ways.close.append(folder.cleanup)
    return ways


def _training_settings(models: Models) -> dict[str, Any]:
    return {
        "model": "the benchmark's",
        "max_steps": 10**6,
        "per_device_train_batch_size": BATCH,
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-6,
        "dataloader_num_workers": 0,
        "validation_steps": 0,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }


def _trainer_step(trainer: Any) -> tuple[Callable[[], float], Iterator[dict[str, Any]]]:
    """A step of the trainer, with its data loader, and its batches."""
    trainer.create_optimizer_and_scheduler(10**6)
    trainer.current_gradient_accumulation_steps = 1  # as the training loop sets it
    ready = _cycle_of(trainer.get_train_dataloader())

    def step() -> float:
        inputs = next(ready)
        trainer.model.train()
        loss = trainer.training_step(trainer.model, inputs)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return float(loss.detach())

    return step, ready


def _tensors(inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor) and name != "places"}


def _cycle_of(loader: Any) -> Iterator[dict[str, Any]]:
    while True:
        yield from loader


def _bare_step(trainer: Any, loss_of: Callable[[], torch.Tensor]) -> Callable[[], float]:
    def step() -> float:
        trainer.model.train()
        loss = loss_of()
        loss.backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return float(loss.detach())

    return step


def _in_turn(paths: Sequence[Path]) -> Iterator[Sequence[Path]]:
    return cycle([paths[start : start + BATCH] for start in range(0, len(paths), BATCH)])


def _near(ours: float, theirs: float, tolerance: float) -> float:
    difference = abs(ours - theirs) / abs(theirs)
    if not difference <= tolerance:
        raise ValueError(f"the losses differ: {ours} and {theirs}")
    return difference


def _near_images(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-3) -> float:
    difference = float((ours - theirs).abs().max())
    if not difference <= tolerance:
        raise ValueError(f"the images differ by {difference}")
    return difference


def _equal_captions(ours: list[str], theirs: list[str]) -> float:
    if ours != theirs:
        number = next(number for number, pair in enumerate(zip(ours, theirs, strict=True)) if len(set(pair)) > 1)
        raise ValueError(f"the captions of image {number} differ: {ours[number]!r} and {theirs[number]!r}")
    return 0.0
