"""`vlv evaluate compare`: several captioners on the same images."""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .errors import UserError
from .evaluating import as_user_errors, progress, read_images
from .models import DTYPES, choose_device, loading
from .output import require_writable
from .references import embed_images, load_clip, read_references, require_references


def run(arguments: argparse.Namespace) -> int:
    from vlv.evaluation.captioner_process import CaptionJob
    from vlv.evaluation.compare import compare, comparison_tables, label_captioners, run_captioner

    require_references(arguments)
    labels = arguments.names or label_captioners(arguments.captioners)
    if arguments.names and not len(set(labels)) == len(labels) == len(arguments.captioners):
        raise UserError(f"--names needs {len(arguments.captioners)} different names, one for each captioner")
    if len(set(labels)) < len(labels):
        raise UserError("a captioner is given twice; leave one out, or tell them apart with --names")
    output = Path(arguments.output_dir)
    require_writable(output, "--output-dir", arguments.output_dir)
    images = dict(list(read_images(arguments.images, "--images").items())[: arguments.limit])
    with as_user_errors():
        read_references(arguments, list(images))  # before captions are made
    device = choose_device(arguments)
    runs = {}
    for number, (label, source) in enumerate(zip(labels, arguments.captioners, strict=True), start=1):
        job = CaptionJob(
            source=source,
            kind=None,
            prompt=arguments.prompt,
            max_new_tokens=arguments.max_new_tokens,
            batch_size=arguments.batch_size,
            dtype=arguments.dtype,
            device=device,
            endpoint={"concurrency": arguments.concurrency, "key_variable": arguments.key_variable},
            images={name: str(path) for name, path in images.items()},
            folder=str(output / f"captioner-{number}"),
        )
        with progress(len(images), label, True) as advance:
            runs[label] = run_captioner(job, advance)

    def measure(names: list[str], sets: Mapping[str, Any]) -> Mapping[str, Any]:
        return _measure(arguments, names, sets, [images[name] for name in names])

    config = {name: value for name, value in vars(arguments).items() if name not in ("run", "settings")}
    with as_user_errors():
        results = compare(runs, list(images), measure, config, arguments.bootstrap, output)
    failed = {label: own.error for label, own in runs.items() if own.error is not None}
    lines = [comparison_tables(results), *(f"note: {note}" for note in results["notes"])]
    lines += [f"failed: {label}: {error}" for label, error in failed.items()]
    print("\n\n".join([*lines, f"written to {output}"]))
    return 1 if failed or any(own.failures for own in runs.values()) else 0


def _measure(
    arguments: argparse.Namespace, names: list[str], sets: Mapping[str, Any], paths: list[Path]
) -> dict[str, Any]:
    """What is measured of the captions of each captioner."""
    from vlv.evaluation.caption_sets import measure_captions
    from vlv.evaluation.compare import diffusion_scores

    given, clip = read_references(arguments, names), load_clip(arguments)
    if clip is not None:
        given.images = embed_images(clip, paths, arguments.batch_size)
    settings = {"bert_model": arguments.bert, "bert_layers": arguments.bert_layer}
    settings |= {"batch_size": arguments.batch_size, "device": choose_device(arguments)}
    measured = {
        label: measure_captions(replace(given, captions=own.captions), clip, **settings) for label, own in sets.items()
    }
    if arguments.score_model:
        texts = {label: own.captions for label, own in sets.items()}
        loaded = {"dtype": DTYPES[arguments.dtype], "device": choose_device(arguments)}
        with (
            progress(len(paths), "diffusion scores", True) as advance,
            loading(f"--score-model {arguments.score_model}"),
        ):
            scores = diffusion_scores(arguments.score_model, paths, texts, loaded, arguments.batch_size, advance)
        for label, values in scores.items():
            measured[label].means["score"] = f"diffusion score ({Path(arguments.score_model).name})", values
    return measured
