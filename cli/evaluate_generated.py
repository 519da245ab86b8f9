"""`vlv evaluate cycle`, `reconstruction`, `spatial` and `composition`: protocols that generate images."""

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlv.captioning.output import require_writable
from vlv.errors import UserError

from .evaluating import (
    as_user_errors,
    choose_detector,
    choose_features,
    load_text_to_image,
    progress,
    read_images,
    resolve_model,
)
from .models import DTYPES, choose_device, loading, use_scheduler

if TYPE_CHECKING:
    from vlv.evaluation.composition import CompositionConfig
    from vlv.evaluation.cycle import CycleConfig
    from vlv.evaluation.generated_images import GenerationConfig
    from vlv.evaluation.reconstruction import ReconstructionConfig
    from vlv.evaluation.spatial import SpatialConfig


def run_protocol(arguments: argparse.Namespace) -> int:
    from vlv.evaluation.composition import CompositionConfig
    from vlv.evaluation.cycle import CycleConfig
    from vlv.evaluation.reconstruction import ReconstructionConfig
    from vlv.evaluation.spatial import SpatialConfig
    from vlv.train.parsing import parse_config

    protocols: dict[str, tuple[Any, Callable]] = {
        "cycle": (CycleConfig, run_cycle),
        "reconstruction": (ReconstructionConfig, run_reconstruction),
        "spatial": (SpatialConfig, run_spatial),
        "composition": (CompositionConfig, run_composition),
    }
    config_class, run = protocols[arguments.protocol]
    config = parse_config(config_class, arguments.settings, f"vlv evaluate {arguments.protocol}")
    require_writable(Path(config.output_dir), "output_dir", config.output_dir)
    with _as_user_errors():
        text, notes = run(config, read_images(config.images, "images"))
    written = [] if config.dry_run else [f"written to {config.output_dir}"]
    print("\n\n".join([text, *(f"note: {note}" for note in notes), *written]))
    return 0


def run_cycle(config: "CycleConfig", images: Mapping[str, Path]) -> tuple[str, list[str]]:
    """The table and the notes, or the plan of a dry run."""
    from vlv.evaluation import cycle
    from vlv.evaluation.guidance_scales import guidance_table

    inputs = cycle.read_inputs(config, images)
    if config.dry_run:
        return cycle.plan_cycle(config, inputs), []
    device = _device(config)
    extractors = [choose_features(name, config.resize, device) for name in config.features]
    captions, facts = inputs.captions, None
    if captions is None:
        assert config.captioner is not None
        with loading(config.captioner):
            captioner = cycle.open_config_captioner(config, resolve_model(config.captioner), device)
        with progress(len(inputs.images), "captions", True) as advance:
            captions, facts = cycle.write_captions(config, captioner, inputs.images, advance)
        del captioner  # its memory is free for the text-to-image model
    source = resolve_model(config.text_to_image)
    load = cache(lambda: load_text_to_image(source, DTYPES[config.dtype], device, config.scheduler))
    fingerprint = _fingerprint(source, load)
    with progress(len(captions) * len(config.guidance), "generated images", True) as advance:
        results = cycle.run_cycle(
            config, captions, inputs.images, load, fingerprint, extractors, facts, device, advance
        )
    return guidance_table(results), results["notes"]


def run_reconstruction(config: "ReconstructionConfig", images: Mapping[str, Path]) -> tuple[str, list[str]]:
    """The table and the notes, or the plan of a dry run."""
    from vlv.evaluation import reconstruction
    from vlv.evaluation.guidance_scales import guidance_table

    images = _take(config, images)
    if config.dry_run:
        return reconstruction.plan_reconstruction(config, images), []
    device = _device(config)
    extractors = [choose_features(name, config.resize, device) for name in config.features]
    load, fingerprint = _reconstruction_model(config.model, config.dtype, config.scheduler, device)
    with progress(len(images) * len(config.guidance), "reconstructions", True) as advance:
        results = reconstruction.run_reconstruction(config, images, load, fingerprint, extractors, device, advance)
    return guidance_table(results), results["notes"]


def run_spatial(config: "SpatialConfig", images: Mapping[str, Path]) -> tuple[str, list[str]]:
    """The table and the notes, or the plan of a dry run."""
    from vlv.evaluation import spatial
    from vlv.evaluation.captioners import endpoint_settings
    from vlv.evaluation.detections import EndpointDetector
    from vlv.evaluation.guidance_scales import guidance_table

    images = _take(config, images)
    if config.dry_run:
        return spatial.plan_spatial(config, images), []
    device = _device(config)
    detector: Any
    if "://" in config.detector:
        settings = endpoint_settings(config.detector, max_tokens=config.max_tokens, **config.options())
        detector = EndpointDetector(settings, Path(config.output_dir) / spatial.DETECTIONS_LOG, config.boxes)
    else:
        detector = choose_detector(config.detector, config.threshold, device)
    load, fingerprint = _reconstruction_model(config.model, config.dtype, config.scheduler, device)
    total = len(images) * (1 + 2 * len(config.guidance))
    with progress(total, "images generated and read", True) as advance:
        results = spatial.run_spatial(config, images, load, fingerprint, detector, advance)
    return guidance_table(results), results["notes"]


def run_composition(config: "CompositionConfig", images: Mapping[str, Path]) -> tuple[str, list[str]]:
    """The table and the notes, or the plan of a dry run."""
    from vlv.evaluation import composition

    pairs = composition.read_pairs(config, images)
    if config.dry_run:
        return composition.plan_composition(config, pairs), []
    device = _device(config)
    instruments = composition.Instruments(
        choose_features(config.features, config.resize, device) if config.features else None,
        choose_detector(config.detector, device=device) if config.detector else None,
        composition.open_judge(config),
    )
    load, fingerprint = _reconstruction_model(config.model, config.dtype, config.scheduler, device)
    total = len(pairs) * len(config.counts) * len(config.guidance)
    with progress(total, "compositions", True) as advance:
        results = composition.run_composition(config, images, pairs, load, fingerprint, instruments, advance)
    return composition.composition_table(results), results["notes"]


def _take(config: "GenerationConfig", images: Mapping[str, Path]) -> dict[str, Path]:
    """The images that `limit` leaves."""
    return dict(list(images.items())[: config.limit])


def _device(config: "GenerationConfig") -> str:
    return choose_device(argparse.Namespace(device=config.device))


def _reconstruction_model(model: str, dtype: str, scheduler: str, device: str) -> tuple[Callable[[], Any], str]:
    """What loads the reconstruction pipeline of a VLV, once, and its fingerprint."""
    source = resolve_model(model)
    load = cache(partial(_load_reconstruction, source, dtype, scheduler, device))
    return load, _fingerprint(source, load)


def _load_reconstruction(source: str, dtype: str, scheduler: str, device: str) -> Any:
    from vlv.pipelines import load_reconstruction

    with loading(source):
        pipeline = load_reconstruction(source, dtype=DTYPES[dtype], device=device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.keep_prompt()
    use_scheduler(pipeline, scheduler, "scheduler")
    return pipeline


def _fingerprint(source: str, load: Callable[[], Any]) -> str:
    from vlv import hub

    if not Path(source).is_dir():
        load()  # downloads the repository, which then has a fingerprint
    return hub.fingerprint(source)


@contextmanager
def _as_user_errors() -> Iterator[None]:
    """Turns the errors of a protocol that the user can correct into a `UserError`."""
    from vlv.evaluation.endpoint import EndpointError, PriceReached

    try:
        with as_user_errors():
            yield
    except (EndpointError, PriceReached) as error:
        raise UserError(str(error)) from error
