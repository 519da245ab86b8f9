"""`vlv caption --num-captions`, `--best-by` and `--confidence`: several captions of an image, and their scores."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlv import hub
from vlv.captioning.batches import Batch
from vlv.captioning.inputs import Input
from vlv.captioning.output import Summary
from vlv.captioning.resume import read_results
from vlv.checkpoints import MINIATURE
from vlv.errors import UserError
from vlv.hub.decoder import referred_diffusion_model

from .parsers.choice import MIN_SCORE
from .parsers.common import NUM_PAIRS

if TYPE_CHECKING:
    from .scoring import BatchScorer

DEFAULTS = {"temperature": 1.0, "seed": 0, "num_pairs": NUM_PAIRS}


def check_min_score(arguments: argparse.Namespace) -> None:
    """Raises `UserError` for a `--min-score` that is not a number, or without `--confidence`."""
    if arguments.min_score is None:
        return
    if not arguments.confidence:
        raise UserError("--min-score needs --confidence")
    if math.isnan(arguments.min_score):
        raise UserError("--min-score is nan; expected a number, such as 0.1")


def complete_choice_arguments(arguments: argparse.Namespace) -> None:
    """Sets the defaults of the options that the others make usable; raises `UserError` for contradictions."""
    several, scored = arguments.num_captions > 1, uses_scores(arguments)
    sampled = several or arguments.temperature is not None
    for option, value, usable, needed in (
        ("--best-by", arguments.best_by, several, "--num-captions 2 or more"),
        ("--seed", arguments.seed, sampled, "--num-captions 2 or more, or --temperature"),
        ("--num-pairs", arguments.num_pairs, scored, "--best-by score or --confidence"),
    ):
        if value is not None and not usable:
            raise UserError(f"{option} needs {needed}")
    if arguments.temperature is not None and not 0 < arguments.temperature < float("inf"):
        raise UserError(f"--temperature is {arguments.temperature:g}; expected a number above 0, such as 1.0")
    check_min_score(arguments)
    if arguments.compile and (arguments.as_original or arguments.num_beams > 1):
        raise UserError(
            "--compile compiles the step that writes one token of each caption, which a search by beams does not "
            "take; leave out --num-beams and --as-original, or --compile"
        )
    if arguments.seed is not None and arguments.seed < 0:
        raise UserError(f"--seed is {arguments.seed}; expected 0 or more")
    if sampled and (arguments.as_original or arguments.num_beams > 1):
        option = "--num-captions" if several else "--temperature"
        raise UserError(f"{option} samples captions; leave out --num-beams and --as-original, which search for one")
    if several and arguments.confidence and not arguments.best_by:
        raise UserError(
            "--confidence is of one caption of each image; add --best-by score, or leave out --num-captions"
        )
    if scored and arguments.embeddings:
        raise UserError("scores are of images, and --embeddings has none; give image paths")
    for name, default in DEFAULTS.items():
        if getattr(arguments, name) is None and (several or name != "temperature"):
            setattr(arguments, name, default)


def uses_scores(arguments: argparse.Namespace) -> bool:
    return bool(arguments.best_by or arguments.confidence)


def recorded_choice(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that change results, for `--resume`; empty for one caption without a score."""
    names: list[str] = []
    if arguments.num_captions > 1:
        names += ["best_by"]
    if uses_scores(arguments):
        names += ["num_pairs"]
    if arguments.confidence:
        names += ["confidence"]
    return {name: getattr(arguments, name) for name in names}


def shared_settings(arguments: argparse.Namespace) -> list[str]:
    """The recorded settings in which all results of a file must agree: their scores are compared."""
    if not uses_scores(arguments):
        return []
    return ["text_to_image", *(["num_pairs"] if arguments.confidence else [])]


def text_to_image_fingerprint(source: str, revision: str | None) -> str:
    """What tells the text-to-image model that scores captions from others, whether in the model's folder or elsewhere.

    Args:
        source: Folder or repo id of the VLV.
    """
    folder = hub.resolve(source, revision=revision, allow_patterns=hub.PIPELINE_FILES)
    own = hub.fingerprint(folder, hub.PIPELINE_FILES)
    referred = referred_diffusion_model(folder)
    return own if referred is None else f"{own}/{referred.fingerprint}"


def choose_min_score(arguments: argparse.Namespace, source: str) -> None:
    """Sets the default of `--min-score`, with a note on standard error if it was measured for another model or K."""
    if not arguments.confidence or arguments.min_score is not None:
        return
    arguments.min_score = MIN_SCORE
    if Path(source).resolve() != MINIATURE.resolve() or getattr(arguments, "num_pairs", NUM_PAIRS) != NUM_PAIRS:
        print(
            f"note: the default --min-score, {MIN_SCORE:g}, was measured for the embedded miniature with --num-pairs "
            f"{NUM_PAIRS}; docs/evaluation.md says how to measure it for another model",
            file=sys.stderr,
        )


def refuse_other_form(output: Path, arguments: argparse.Namespace) -> None:
    """Raises `UserError` if the results in a file to go on with have another form than this run's."""
    forms: dict[type, str] = {
        str: "one caption of each image",
        list: "several captions of each image",
        dict: "captions with scores",
    }
    form: type = (
        dict if arguments.confidence else list if arguments.num_captions > 1 and not arguments.best_by else str
    )
    for entry in read_results(output, "--resume").values():
        columns = len(entry) if isinstance(entry, list) and output.suffix.lower() == ".csv" else None
        if form is list and columns not in (None, arguments.num_captions):
            raise UserError(
                f"--resume: {output} has columns of {columns} captions of each image, and this run writes "
                f"{arguments.num_captions}; pass --num-captions {columns}, another --output, or --overwrite to "
                "replace it"
            )
        if not isinstance(entry, form):
            there = next((name for kind, name in forms.items() if isinstance(entry, kind)), "other values")
            raise UserError(
                f"--resume: {output} has {there}, and this run writes {forms[form]}; "
                "give the options of then, pass another --output, or --overwrite to replace it"
            )


def choose_captions(
    groups: Sequence[Sequence[str]],
    batch: Batch,
    scorer: "BatchScorer | None",
    arguments: argparse.Namespace,
    summary: Summary,
) -> tuple[list[Input], list[Any]]:
    """What the output has for the images of a batch, and those images: without those whose scores failed.

    Args:
        groups: The captions of each image.
        scorer: None where no score is asked for.
    """
    if scorer is None:
        return batch.inputs, [own[0] if arguments.num_captions == 1 else list(own) for own in groups]
    from vlv.pipelines import mark_confidence

    inputs, results = [], []
    for item, own, scores in zip(
        batch.inputs, groups, scorer.score(batch, groups, summary, partial=True), strict=True
    ):
        if scores is None:
            continue
        best = max(range(len(own)), key=scores.__getitem__)
        entry = {"caption": own[best], "score": scores[best]}
        inputs.append(item)
        results.append(mark_confidence(entry, arguments.min_score) if arguments.confidence else own[best])
    return inputs, results
