"""A YAML file and command-line overrides into one configuration dataclass; what is unknown is an error."""

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser

Config = TypeVar("Config")


def parse_config(config_class: type[Config], arguments: Sequence[str], program: str) -> Config:
    """Builds a configuration from `[CONFIG.yaml] [--name value ...]`; the command line wins.

    Ends the program with a message, as argparse does, where a name or a value is wrong.
    """
    parser = HfArgumentParser(
        config_class,
        prog=program,
        usage=f"{program} CONFIG.yaml [--name value ...]",
        description=f"Every name below may stand in CONFIG.yaml, too. {(config_class.__doc__ or '').strip()}",
    )
    known = [field.name for field in dataclasses.fields(config_class) if field.init]  # type: ignore[arg-type]
    rest = list(arguments)
    if rest and not rest[0].startswith("-"):
        parser.set_defaults(**_read_yaml(Path(rest.pop(0)), known, parser))
    try:
        config, unknown = parser.parse_args_into_dataclasses(
            rest, look_for_args_file=False, return_remaining_strings=True
        )
    except ValueError as error:  # from the configuration's own checks
        parser.error(str(error))
    for name in unknown:
        if name.endswith((".yaml", ".yml")):
            parser.error(f"{name} must come first, before --name value")
        parser.error(_advice(name.lstrip("-").split("=")[0], known))
    return config


def _read_yaml(path: Path, known: list[str], parser: HfArgumentParser) -> dict[str, Any]:
    if not path.is_file():
        parser.error(f"{path} does not exist; the first argument is a YAML file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        parser.error(f"{path} is no YAML: {error}")
    if not isinstance(values, dict):
        parser.error(f"{path} must hold `name: value` lines, not a {type(values).__name__}")
    for name in values:
        if name not in known:
            parser.error(f"{path}: {_advice(str(name), known)}")
    # As text, numbers go through the same conversion as the command line's: to YAML, 1e-4 is text anyway.
    return {
        name: str(v) if isinstance(v, (int, float)) and not isinstance(v, bool) else v for name, v in values.items()
    }


def _advice(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else "; see --help")
