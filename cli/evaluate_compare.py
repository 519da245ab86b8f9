"""`vlv evaluate compare`: several captioners on the same images."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlv.captioning.output import require_writable
from vlv.errors import UserError

from .evaluating import as_user_errors, progress, read_images, resolve_model
from .models import DTYPES, choose_device, loading
from .references import embed_images, load_clip, read_references, require_references

ENDPOINT_OPTIONS = ("concurrency", "timeout", "max_retries", "temperature", "price_in", "price_out", "max_price")


def run(arguments: argparse.Namespace) -> int:
    from vlv.evaluation.captioner_process import CaptionJob
    from vlv.evaluation.compare import (
        captioner_folder,
        compare,
        comparison_tables,
        label_captioners,
        run_captioner,
    )

    require_references(arguments)
    sources = [resolve_model(source) for source in arguments.captioners]
    labels = arguments.names or label_captioners(sources)
    if arguments.names and not len(set(labels)) == len(labels) == len(sources):
        raise UserError(f"--names needs {len(sources)} different names, one for each captioner")
    if len(set(labels)) < len(labels):
        raise UserError("a captioner is given twice; leave one out, or tell them apart with --names")
    captioners = dict(zip(labels, sources, strict=True))
    prompts = _by_label("--prompt", arguments.prompt, labels)
    with as_user_errors():
        endpoints = _endpoint_settings(arguments, captioners)
    output = Path(arguments.output_dir)
    require_writable(output, "--output-dir", arguments.output_dir)
    images = dict(list(read_images(arguments.images, "--images").items())[: arguments.limit])
    with as_user_errors():
        read_references(arguments, list(images))  # before captions are made
    _require_models(arguments)
    device = choose_device(arguments)
    runs = {}
    for label, source in captioners.items():
        prompt = prompts.get(label, prompts.get(None))
        job = CaptionJob(
            source=source,
            kind=None,
            prompt=prompt,
            max_new_tokens=arguments.max_new_tokens,
            batch_size=arguments.batch_size,
            dtype=arguments.dtype,
            device=device,
            endpoint=endpoints.get(label, {}),
            images={name: str(path) for name, path in images.items()},
            folder=str(output / captioner_folder(source, prompt)),
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


def _by_label(option: str, values: Sequence[str], labels: Sequence[str]) -> dict[str | None, str]:
    """The values of an option by the name of the captioner, `NAME=value`; a value without a name is by None.

    Raises:
        UserError: If two values are of one name, or without one.
    """
    found: dict[str | None, str] = {}
    for given in values:
        label = max((label for label in labels if given.startswith(f"{label}=")), key=len, default=None)
        if label in found:
            whose = "without a name" if label is None else f"of {label}"
            raise UserError(f"{option} is given twice {whose}; the names are {', '.join(labels)}, as in NAME=...")
        found[label] = given if label is None else given[len(label) + 1 :]
    return found


def _endpoint_settings(arguments: argparse.Namespace, captioners: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The settings of each endpoint, of which each is sent its own key or none.

    Raises:
        UserError: If a key's variable is not set or has no endpoint.
        ValueError: As `endpoint.EndpointSettings`.
    """
    from vlv.evaluation.captioners import endpoint_settings
    from vlv.evaluation.endpoint import EndpointError, find_key, is_openai

    variables = _by_label("--key-variable", arguments.key_variable, list(captioners))
    endpoints = [label for label, source in captioners.items() if source.startswith(("http://", "https://"))]
    plain = variables.pop(None, None)
    if set(variables) - set(endpoints) or (plain is not None and ("=" in plain or not endpoints)):
        raise UserError(
            f"--key-variable {' '.join(arguments.key_variable)} is of a captioner that is not an endpoint; "
            f"the endpoints are {', '.join(endpoints) or 'none'}, as in NAME=VARIABLE"
        )
    found = {}
    for label in endpoints:
        options = {name: getattr(arguments, name) for name in ENDPOINT_OPTIONS}
        settings = endpoint_settings(captioners[label], **options)
        is_plain = len(endpoints) == 1 or is_openai(settings.base_url)
        options["key_variable"] = variables.get(label, plain if is_plain else None)
        try:
            find_key(replace(settings, key_variable=options["key_variable"]))
        except EndpointError as error:
            raise UserError(f"{label}: {error}") from error
        found[label] = options
    return found


def _require_models(arguments: argparse.Namespace) -> None:
    """Raises `UserError` if a model that measures captions does not load or fit, before captions are made and paid."""
    from vlv.evaluation.caption_metrics import load_text_encoder

    load_clip(arguments)
    if arguments.bert:
        with loading(f"--bert {arguments.bert}"):
            load_text_encoder(arguments.bert, arguments.bert_layer)
    if arguments.score_model:
        from diffusers import DiffusionPipeline

        with loading(f"--score-model {arguments.score_model}"):
            config = DiffusionPipeline.load_config(resolve_model(arguments.score_model))
            if "VLV" not in str(config["_class_name"]):
                raise ValueError(f"it is a {config['_class_name']}, not a VLV")


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
        texts, model = {label: own.captions for label, own in sets.items()}, resolve_model(arguments.score_model)
        loaded = {"dtype": DTYPES[arguments.dtype], "device": choose_device(arguments)}
        with (
            progress(len(paths), "diffusion scores", True) as advance,
            loading(f"--score-model {arguments.score_model}"),
        ):
            scores = diffusion_scores(model, paths, texts, loaded, arguments.batch_size, advance)
        for label, values in scores.items():
            measured[label].means["score"] = f"diffusion score ({Path(arguments.score_model).name})", values
    return measured
