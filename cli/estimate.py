"""`vlv estimate`: what a training costs, from its configuration alone."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vlv.errors import UserError

if TYPE_CHECKING:
    from vlv.train.estimate import Estimate

PROGRAM = "vlv estimate"
ON_CPU = ("--use_cpu", "true")  # transformers accepts bf16 on a machine without a GPU only with it


def run(arguments: argparse.Namespace) -> int:
    from vlv.train.estimate import estimate, find_stage, recipe_beside
    from vlv.train.hardware import find_gpu
    from vlv.train.parsing import parse_config
    from vlv.train.stage1_trainer import Stage1Config
    from vlv.train.stage2_trainer import Stage2Config
    from vlv.train.stage3_config import Stage3Config

    path = Path(arguments.config)
    notes: list[str] = []
    stage1 = stage2 = None
    try:
        gpu = find_gpu(arguments.gpu)
        stage = arguments.stage or find_stage(_settings(path, arguments.settings))
        classes: dict[int, Any] = {1: Stage1Config, 2: Stage2Config, 3: Stage3Config}
        config: Any = parse_config(classes[stage], [arguments.config, *arguments.settings, *ON_CPU], PROGRAM)
        beside, model = path, config.model
        if stage != 3 and arguments.stage2 is not None:
            raise ValueError(f"--stage2 makes the captioner of stage 3, and {path} is of stage {stage}; leave it out")
        if stage == 3 and arguments.stage2 is not None and model is not None and Path(model).exists():
            notes.append(f"{model} exists: --stage2 is not read")
        if stage == 3 and model is not None and not Path(model).exists():
            beside, stage2 = _recipe_of_captioner(path, model, arguments.stage2)
            if stage2 is not None:
                notes.append(f"{model} does not exist: counted as a recipe of stage 2 will make it")
                model = stage2.model
        if stage > 1 and model is not None and not Path(model).exists():
            stage1 = recipe_beside(beside, model, PROGRAM)
            if stage1 is not None:
                notes.append(f"{model} does not exist: counted as a recipe of stage 1 in {beside.parent} will make it")
        found = estimate(
            config,
            gpu,
            arguments.count,
            price=arguments.price,
            utilization=_utilization(arguments.utilization),
            stage1=stage1,
            stage2=stage2,
            samples=arguments.samples,
            caption_tokens=arguments.caption_tokens,
            cached_moments=arguments.cached_moments,
            cached_features=arguments.cached_vision_features,
            tf32=arguments.tf32,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    found.notes = notes + found.notes
    print(json.dumps(found.to_dict(), indent=2) if arguments.json else as_text(found))
    return 0


def _recipe_of_captioner(path: Path, model: str, stage2: str | None) -> tuple[Path, Any]:
    """The recipe of stage 2 that will make the captioner of a recipe of stage 3, and its configuration.

    Args:
        path: Of the recipe of stage 3. Recipes of stage 2 are beside it, or beside its folder.
        stage2: The recipe that the user names.

    Returns:
        The path and None if there is no such recipe.
    """
    from vlv.train.estimate import recipe_beside
    from vlv.train.parsing import parse_config
    from vlv.train.stage2_trainer import Stage2Config

    if stage2 is not None:
        return Path(stage2), parse_config(Stage2Config, [stage2, *ON_CPU], PROGRAM)
    for beside in (path, path.absolute().parent):
        if (found := recipe_beside(beside, model, PROGRAM, stage=2)) is not None:
            return beside, found
    return path, None


def _settings(path: Path, options: list[str]) -> set[str]:
    """The names that the file and the options set. What is wrong with them `parse_config` says."""
    names = {option.lstrip("-").partition("=")[0] for option in options if option.startswith("--")}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; give the configuration of a training") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a YAML file: {error}") from error
    return names | (set(map(str, values)) if isinstance(values, dict) else set())


def _utilization(options: list[str]) -> dict[str, float]:
    shares = {}
    for option in options:
        part, _, share = option.rpartition("=")
        try:
            shares[part] = float(share)
        except ValueError:
            raise UserError(f"--utilization is {option!r}; expected a share, or PART=SHARE") from None
    return shares


def _text_of_rounds(figures: dict[str, Any], count: int) -> list[str]:
    """What comes before the steps of each round, as lines of text."""
    parts = ", ".join(
        f"{name.replace('_', ' ')} {seconds:.3f} s ({figures['tflop_per_image'][name]:.2f} TFLOP)"
        for name, seconds in figures["seconds_per_image"].items()
    )
    return [
        "",
        f"{figures['rounds']} rounds of {figures['images']:,} images, {figures['captions_per_image']} samples and "
        f"{figures['denoiser_passes_per_image']} passes of the denoiser an image",
        f"an image on a card: {parts}",
        f"{figures['hours_of_all_rounds']:,.1f} hours of all rounds on {count} cards, besides the steps; keys and "
        f"values of the samples {figures['cache_bytes'] / 1e9:.1f} GB",
    ]


def as_text(found: "Estimate") -> str:
    """The estimate as lines of text."""
    figures = found.to_dict()
    memory = found.memory
    lines = [
        f"stage {found.stage} on {found.count} x {found.gpu.name}: {found.steps:,} steps of "
        f"{figures['images_per_step']:,} images ({found.batch} a card"
        + (f", {found.accumulation} times" if found.accumulation > 1 else "")
        + f"), {found.images() / 1e6:,.1f} M in all",
        f"parameters: {found.trained / 1e6:,.1f} M trained, {found.frozen / 1e6:,.1f} M frozen",
        "",
        f"{'TFLOP an image':22}{'forward':>10}{'backward':>10}{'precision':>11}{'of peak':>9}{'of time':>9}",
    ]
    for name, part in figures["tflop_per_image"].items():
        if part["share_of_time"] < 5e-5:
            continue
        lines.append(
            f"{name:22}{part['forward']:10.3f}{part['backward']:10.3f}{part['precision']:>11}"
            f"{part['utilization']:9.0%}{part['share_of_time']:9.1%}"
        )
    lines += [
        f"{'total':22}{figures['tflop_per_image_total']:20.3f}",
        "",
        f"{figures['images_per_second']:,.0f} images/s, {figures['seconds_per_step']:.2f} s a step",
        *(_text_of_rounds(figures["round"], found.count) if "round" in figures else []),
        f"{found.hours():,.1f} hours, {found.gpu_hours():,.0f} GPU-hours, ${found.dollars():,.0f} at "
        f"${found.price:.2f} a GPU-hour",
        "",
        f"{'memory of one card':22}{'GB':>10}",
        *(
            f"{name.replace('_', ' '):22}{value / 1e9:10.1f}"
            for name, value in vars(memory).items()
            if isinstance(value, int) and value
        ),
        f"{'total, at most':22}{memory.total() / 1e9:10.1f}  (the most activations: {memory.activations_peak_at})",
    ]
    if found.notes:
        lines += ["", *(f"note: {note}" for note in found.notes)]
    return "\n".join(lines)
