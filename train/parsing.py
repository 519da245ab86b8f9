"""Reads a YAML file and command-line options into a configuration dataclass; prints errors in one line."""

import argparse
import dataclasses
import difflib
import errno
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml
from safetensors import SafetensorError
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .failing import end_with_others
from .setting_groups import arrange
from .stage_config import same_command

Config = TypeVar("Config")

RENAMED = {
    "encoder": "image_encoder",
    "decoder": "diffusion_model",
    "num_queries": "num_query_tokens",
    "sample_steps": "validation_steps",
    "sample_images": "num_validation_images",
    "decoder_image_size": "diffusion_image_size",
    "decoder_gradient_checkpointing": "diffusion_gradient_checkpointing",
}
"""Former names of settings, and their present names."""
OF_OTHER_STAGES = {
    "images": ("pairs", "stage 2 trains on image-caption pairs"),
    "pairs": ("images", "stage 1 trains on images alone"),
    "eval_images": ("eval_pairs", "stage 2 is evaluated on image-caption pairs"),
    "eval_pairs": ("eval_images", "stage 1 is evaluated on images alone"),
}
"""Settings that a stage lacks, its own in their place, and why."""
SIMILAR = 0.68
"""How alike a wrong name and a suggestion are at least, as difflib counts."""


OUT_OF_MEMORY = ("out of memory", "not enough memory", "allocate memory", "OutOfMemoryError")
"""In the messages of torch, on any device."""
SAVE_MEMORY = (
    "lower --per_device_train_batch_size (and raise --gradient_accumulation_steps), or pass --gradient_checkpointing, "
    "--diffusion_gradient_checkpointing (stage 1), --bf16 or --optim adamw_bnb_8bit; see docs/scale.md"
)
REMEDIES = {
    errno.ENOSPC: "; make room, and the same command goes on from the last checkpoint",
    errno.EDQUOT: "; make room, and the same command goes on from the last checkpoint",
    errno.EFBIG: "; the file system or a limit allows no larger files; name another --output_dir",
    errno.EACCES: "; change its permissions, or name another --output_dir",
    errno.EPERM: "; change its permissions, or name another --output_dir",
    errno.EROFS: "; name another --output_dir",
}


class GatherAction(argparse.Action):
    """Several values of an option, after it or after each of its repetitions. They replace those of the YAML file."""

    given = False

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest) if self.given else []
        setattr(namespace, self.dest, [*before, *values])
        self.given = True


def parse_config(config_class: type[Config], arguments: Sequence[str], program: str) -> Config:
    """Builds a configuration from `[CONFIG.yaml] [--name value ...]`. The command line overrides the file.

    Ends the program with a message on stderr, as argparse does, if a name or a value is wrong.
    """
    parser = settings_parser(config_class, program)
    known = [field.name for field in dataclasses.fields(config_class) if field.init]  # type: ignore[arg-type]
    options = list(arguments)
    if options and not options[0].startswith("-"):
        recipes = find_recipes(getattr(config_class, "RECIPES", ()))
        parser.set_defaults(**_read_yaml(Path(options.pop(0)), known, parser, recipes))
    try:
        config, unknown = parser.parse_args_into_dataclasses(
            options, look_for_args_file=False, return_remaining_strings=True
        )
    except (ValueError, OSError, ImportError) as error:  # from the checks of the configuration
        parser.error(describe_error(error) or str(error))
    for name in unknown:
        if name.endswith((".yaml", ".yml")):
            parser.error(f"{name} must come first, before --name value")
        parser.error(_unknown_setting(name.lstrip("-").split("=")[0], known))
    return config


def settings_parser(config_class: type, program: str) -> HfArgumentParser:
    """The parser of a configuration's settings, which writes the command's `--help`."""
    about = (config_class.__doc__ or "").partition("Raises:")[0].strip()
    parser = HfArgumentParser(
        config_class,
        prog=program,
        usage=f"{program} [CONFIG.yaml] [--name value ...]",
        description=f"All options can also be set in CONFIG.yaml. {about}",
        allow_abbrev=False,  # otherwise --encoder, say, would set encoder_image_size
    )
    if issubclass(config_class, TrainingArguments):
        arrange(parser, _own_settings(config_class))
    return parser


def _own_settings(config_class: Any) -> set[str]:
    """The names of the settings that a class and its bases add to `TrainingArguments`, or set anew."""
    bases = [base for base in config_class.__mro__ if base not in TrainingArguments.__mro__]
    return {name for base in bases for name in vars(base).get("__annotations__", ())}


def find_recipes(patterns: Sequence[str]) -> list[Path]:
    """The recipes of this package with such names, relative to the working directory where they are in it."""
    folder = Path(__file__).with_name("configs")
    found = [path.resolve() for pattern in patterns for path in sorted(folder.glob(pattern))]
    return [path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path for path in found]


def _read_yaml(path: Path, known: list[str], parser: HfArgumentParser, recipes: Sequence[Path]) -> dict[str, Any]:
    if not path.is_file():
        shipped = f", such as a recipe of this package: {', '.join(map(str, recipes))}" if recipes else ""
        parser.error(f"{path} does not exist; the first argument is a YAML file{shipped}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        parser.error(f"{path} is not valid YAML: {error}")
    if not isinstance(values, dict):
        parser.error(f"{path} must contain `name: value` lines, not a {type(values).__name__}")
    for name in values:
        if name not in known:
            parser.error(f"{path}: {_unknown_setting(str(name), known)}")
    # As text, numbers take the same conversion as those of the command line. YAML reads 1e-4 as text in any case.
    return {
        name: str(v) if isinstance(v, (int, float)) and not isinstance(v, bool) else v for name, v in values.items()
    }


def _unknown_setting(name: str, known: list[str]) -> str:
    new = RENAMED.get(name.replace("-", "_"))
    if new in known:
        return f"{name!r} was renamed to {new!r}"
    own, why = OF_OTHER_STAGES.get(name.replace("-", "_"), (None, ""))
    if own in known:
        return f"unknown setting {name!r}: {why} (--{own})"
    similar = difflib.get_close_matches(name, known, n=1, cutoff=SIMILAR)
    return f"unknown setting {name!r}" + (f"; did you mean {similar[0]!r}?" if similar else "; see --help")


class FailedRun(SystemExit):
    """Ends the program with exit code 2. The message has been printed."""

    def __init__(self, message: str):
        super().__init__(message)
        self.code = 2


PEER_ENDED = ("Connection closed by peer", "Connection reset by peer", "remote process exiting prematurely")
"""In the messages of gloo and NCCL."""
DESCRIBED = (ValueError, OSError, ImportError, SafetensorError, MemoryError, RuntimeError)


@contextmanager
def errors_in_one_line(program: str, config: Any = None) -> Iterator[None]:
    """Ends the program with the message of an error that the user can correct, without a traceback.

    Of several processes the others end, too, each with a line that names the one that has failed.

    Args:
        config: Of the run, for what is said after Ctrl-C.

    Raises:
        FailedRun: With the message, which is printed, and exit code 2.
        SystemExit: With code 130 after Ctrl-C.
    """
    with end_with_others(program) as announce:
        try:
            yield
        except KeyboardInterrupt as error:
            print(f"{program}: interrupted{'' if config is None else _how_to_go_on(config)}", file=sys.stderr)
            raise SystemExit(130) from error
        except Exception as error:
            message = describe_error(error) if isinstance(error, DESCRIBED) else None
            kind = f"{type(error).__name__}: "
            other = announce(message or kind + last_line(str(error)).removeprefix(kind))
            if isinstance(error, RuntimeError) and other is not None:
                message = other  # the error is a connection that the other process has closed
            if message is None:
                raise
            print(f"{program}: {message}", file=sys.stderr, flush=True)
            raise FailedRun(f"{program}: {message}") from error


def _how_to_go_on(config: Any) -> str:
    """What the same command does after Ctrl-C."""
    if config.dry_run:
        return "; a dry run leaves nothing"
    if any(Path(config.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")):
        return f"; {same_command(config)} goes on from the last checkpoint"
    return f"; {config.output_dir} has no checkpoint yet, so the same command begins the training anew"


def last_line(text: str) -> str:
    return text.rstrip().rpartition("\n")[2]


def describe_error(error: Exception) -> str | None:
    """What an error says to a person who can correct it, or None for an error of the code."""
    message = str(error)
    if "Original Traceback" in message:  # from a process of the data loader
        message = last_line(message)
        message = message.partition("Error: ")[2] or message
    if isinstance(error, MemoryError) or any(sign in message for sign in OUT_OF_MEMORY):
        reason = message.strip().partition("\n")[0].partition(". Tried")[0] or "out of memory"
        return f"{reason}: {SAVE_MEMORY}"
    if "DataLoader worker" in message and "killed" in message:
        return (
            f"{message.partition(chr(10))[0]}; usually the machine has run out of memory: lower "
            "--dataloader_num_workers or --per_device_train_batch_size"
        )
    if isinstance(error, RuntimeError) and any(sign in message for sign in PEER_ENDED):
        return (
            "the connection to another process of this run has ended; what that process or the launcher says tells "
            "why. The same command goes on from the last checkpoint"
        )
    if "to be installed" in message or "is not installed" in message:  # of the Trainer's reports
        return f"{message}; or choose another --report_to"
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename else ""
        return name + error.strerror + REMEDIES.get(error.errno or 0, "")
    return None if type(error) is RuntimeError else message
