"""`vlv evaluate`: metrics of a model, of images or of captions, printed and written as JSON."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlv.captioning.output import output_path, refuse_existing, require_writable
from vlv.errors import UserError
from vlv.files import write_json

from .evaluating import as_user_errors, choose_features, progress, read_images
from .models import choose_device, choose_model, loading
from .references import embed_images, load_clip, read_references, require_references


def run_miniature(arguments: argparse.Namespace) -> int:
    from vlv.miniature.evaluation import evaluate_captions, evaluate_miniature
    from vlv.miniature.metrics import distances_table, goals_table, instructions_table, scores_table

    output = output_path(arguments.output, ".json")
    if not arguments.overwrite:
        refuse_existing(output, "--output")
    images_dir = None if arguments.images_dir is None else Path(arguments.images_dir)
    if images_dir is not None:
        require_writable(images_dir, "--images-dir", arguments.images_dir)
        if images_dir.exists() and any(images_dir.iterdir()):
            raise UserError(f"--images-dir {images_dir} is not empty; give a new folder, so that images are not mixed")
        if arguments.scenes < 2:
            raise UserError("--images-dir needs --scenes of at least 2: a Fréchet distance is of two images or more")
    folder = choose_model(arguments)
    found: dict[str, Any] = {}

    def record(part: str, metrics: Mapping[str, Any]) -> None:
        values = ", ".join(f"{name} {value}" for name, value in metrics.items())
        print(f"{part}: {values}", file=sys.stderr, flush=True)
        found[part] = metrics
        write_json(output, found)

    if arguments.captions_only:
        evaluate_captions(folder, record, n=arguments.scenes, images_dir=images_dir)
    else:
        steps = arguments.num_inference_steps
        evaluate_miniature(folder, record, n=arguments.scenes, steps=steps, images_dir=images_dir)
    tables = [scores_table(found), distances_table(found), goals_table(found), instructions_table(found)]
    print("\n\n".join([*filter(None, tables), f"written to {output}"]))
    return 0


def run_images(arguments: argparse.Namespace) -> int:
    from vlv.evaluation import image_sets
    from vlv.evaluation.results import BOOTSTRAP_SAMPLES, per_image

    output = _output(arguments)
    generated = read_images(arguments.generated, "--generated")
    reference = read_images(arguments.reference, "--reference") if arguments.reference else {}
    if not reference and not arguments.reference_statistics:
        raise UserError("pass --reference DIR, or --reference-statistics FILE that an earlier run wrote")
    files = {}
    for kind in ("generated", "reference"):
        text = getattr(arguments, f"{kind}_statistics")
        own = kind == "generated" or reference
        files[kind] = (
            output_path(text, ".safetensors", f"--{kind}-statistics") if text and own else text and Path(text)
        )
    try:
        matches = image_sets.match_pairs(generated, reference)
    except ValueError as error:
        if arguments.pair_metrics:
            raise UserError(f"{error}, or pass --pair-metrics without a name to compare the sets alone") from error
        matches = []
    is_main = _join_processes()
    extractor = choose_features(arguments.features, arguments.resize, choose_device(arguments))
    statistics = {}
    with as_user_errors():
        image_sets.require_pair_metrics(arguments.pair_metrics, [extractor])
        for kind, images in (("generated", generated), ("reference", reference)):
            with progress(len(images), f"features of {kind} images", is_main) as advance:
                statistics[kind] = image_sets.cached_statistics(
                    list(images.values()), extractor, files[kind], batch_size=arguments.batch_size, advance=advance
                )
        if not is_main:
            return 0
        samples = arguments.bootstrap
        figures, notes = image_sets.compare_sets(
            statistics["generated"],
            statistics["reference"],
            extractor,
            image_sets.DISTANCE_SAMPLES if samples is None else samples,
            paired=matches == list(zip(generated, reference, strict=False)) and len(generated) == len(reference),
        )
        pairs = matches if arguments.pair_metrics else []
        values: dict[str, Sequence[float]] = {}
        if reference and arguments.pair_metrics and len(pairs) < len(generated):
            notes.append(f"{len(generated) - len(pairs)} generated images have no reference of their name")
        if pairs:
            if "cosine" in arguments.pair_metrics:
                rows = [{name: row for row, name in enumerate(images)} for images in (generated, reference)]
                values["cosine"] = image_sets.cosine_similarities(
                    statistics["generated"].features[[rows[0][name] for name, _ in pairs]],
                    statistics["reference"].features[[rows[1][name] for _, name in pairs]],
                )
            paths = [(generated[name], reference[original]) for name, original in pairs]
            others = [name for name in arguments.pair_metrics if name not in image_sets.FEATURE_METRICS]
            if others:
                with progress(len(paths), "pairs", is_main) as advance:
                    values |= image_sets.compare_pairs(paths, others, choose_device(arguments), advance)
            samples = BOOTSTRAP_SAMPLES if samples is None else samples
            found, more = image_sets.pair_figures(values, samples)
            figures, notes = figures | found, notes + more
            if "scenes" in arguments.pair_metrics:
                found, scenes = image_sets.scene_figures(
                    extractor, [path for path, _ in paths], [path for _, path in paths], samples
                )
                figures, values = figures | found, values | scenes
    counts = {f"num_{kind}": one.count for kind, one in statistics.items()}
    facts = {"features": extractor.name, **counts, "num_pairs": len(pairs)}
    facts["per_image"] = per_image(values, [name for name, _ in pairs])
    return _finish(arguments, output, figures, notes, facts)


def run_captions(arguments: argparse.Namespace) -> int:
    from vlv.evaluation import caption_sets
    from vlv.evaluation.captioners import ImageCaption, caption_notes
    from vlv.evaluation.results import BOOTSTRAP_SAMPLES, per_image
    from vlv.miniature.scene_agreement import measure_captions as measure_scenes

    output = _output(arguments)
    if bool(arguments.clip) != bool(arguments.images):
        raise UserError("CLIPScore needs both --clip MODEL and --images DIR")
    if arguments.read_scenes and not arguments.references:
        raise UserError("--read-scenes compares scenes with those of references; pass --references FILE")
    require_references(arguments)
    with as_user_errors():
        captions = caption_sets.read_captions(arguments.captions)
        names = list(captions)
        given = replace(read_references(arguments, names), captions=list(captions.values()))
        clip, tokenizer = load_clip(arguments), None
        if clip is not None:
            paths = caption_sets.entries_of(
                names, read_images(arguments.images, "--images"), f"--images {arguments.images}"
            )
            given.images = embed_images(clip, paths, arguments.batch_size)
        if arguments.tokenizer:
            from transformers import AutoTokenizer

            with loading(arguments.tokenizer):
                tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
        measured = caption_sets.measure_captions(
            given,
            clip,
            arguments.bert,
            arguments.bert_layer,
            tokenizer,
            arguments.max_new_tokens,
            arguments.batch_size,
            choose_device(arguments),
        )
        if arguments.read_scenes:
            scenes = measure_scenes(given.captions, given.references or [])
            measured.statistics |= scenes.statistics
            measured.means |= scenes.means
        samples = BOOTSTRAP_SAMPLES if arguments.bootstrap is None else arguments.bootstrap
        figures = measured.figures(len(names), samples)
    measured.notes += caption_notes([ImageCaption(name, caption) for name, caption in captions.items()])
    facts = {"num_captions": len(names), "per_image": per_image(measured.values, names)}
    return _finish(arguments, output, figures, measured.notes, facts)


def _output(arguments: argparse.Namespace) -> Path:
    output = output_path(arguments.output, ".json")
    if not arguments.overwrite:
        refuse_existing(output, "--output")
    return output


def _join_processes() -> bool:
    """Joins the processes that `accelerate launch` or `torchrun` started; whether this is the one that prints."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available()).is_main_process


def _finish(
    arguments: argparse.Namespace,
    output: Path,
    figures: Mapping[str, Any],
    notes: Sequence[str],
    facts: Mapping[str, Any],
) -> int:
    """Writes the JSON file and prints the table."""
    from vlv.evaluation.results import figures_table, package_versions

    config = {name: value for name, value in vars(arguments).items() if name not in ("run", "settings")}
    write_json(output, {"metrics": figures, "notes": notes, **facts, "config": config, "versions": package_versions()})
    lines = [figures_table(figures), *(f"note: {note}" for note in notes), f"written to {output}"]
    print("\n\n".join(lines))
    return 0
