"""The command `vlv`."""

import argparse
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from vlv.errors import UserError
from vlv.version import __version__

from .parsers import caption, convert, data, demo, encode, estimate, evaluate, info, push, reconstruct, score, serve
from .settings_help import stored_help

RENAMED_OPTIONS = {("push", "--decoder"): "--diffusion-model"}
SIMILARITY = 0.7
"""Of a mistyped option to the one that is suggested: 1 is equal."""
STAGES = ("stage1", "stage2", "stage3")
TRAIN_USAGE = (
    f"usage: vlv train {{{','.join(STAGES)}}} CONFIG.yaml [--name value ...]    (vlv train stage1 --help lists the "
    "names)\n"
    "  stage1  an encoder, from images alone\n"
    "  stage2  a captioner, from image-caption pairs\n"
    "  stage3  a better captioner, from images alone: the frozen decoder scores its own captions"
)
# Pillow's warnings about images that are read all the same. They do not name the file.
IGNORED_WARNINGS = (
    r"Image size \(\d+ pixels\) exceeds limit",  # Pillow refuses images of twice the limit; they are named as failed
    "Corrupt EXIF data",
    "Truncated File Read",
)


class Parser(argparse.ArgumentParser):
    """Accepts options by their full name, with dashes or underscores, and answers a wrong one in one line.

    By default argparse also accepts prefixes, such as `--out`, and prints all options before an error.
    """

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        """As argparse, but the parser of a command that takes no settings refuses what it does not know."""
        given = list(sys.argv[1:] if args is None else args)
        takes_settings = self.get_default("takes_settings")
        if not takes_settings:  # a setting of a configuration may have the same name with underscores
            end = given.index("--") if "--" in given else len(given)
            given[:end] = map(self._with_dashes, given[:end])
        options, unknown = super().parse_known_args(given, namespace)
        if unknown and self.get_default("run") and not takes_settings:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._suggestion(unknown)}")
        return options, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")

    def _with_dashes(self, argument: str) -> str:
        """An argument, with `--image-root=DIR` for `--image_root=DIR` where `--image-root` is an option."""
        name, equals, value = argument.partition("=")
        dashes = name.replace("_", "-")
        known = name not in self._option_string_actions and dashes in self._option_string_actions
        return f"{dashes}{equals}{value}" if known else argument

    def _suggestion(self, unknown: Sequence[str]) -> str:
        """The options that unknown ones resemble, as the end of a message."""
        names = [name for name in self._option_string_actions if name.startswith("--")]
        given = [argument.partition("=")[0].replace("_", "-") for argument in unknown if argument.startswith("--")]
        alike = [match for name in given for match in get_close_matches(name, names, 1, SIMILARITY)]
        return f"; did you mean {', '.join(alike)}?" if alike else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0 if all inputs were processed, 1 if some failed, 2 if the command could not run or go on, 130
        if it was interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if (text := stored_help(arguments)) is not None:
        print(text, end="")
        return 0
    if arguments[:1] == ["train"]:  # its arguments are a YAML file and settings that override it
        return _train(arguments[1:])
    return _run(arguments)


def _run(arguments: list[str]) -> int:
    parser = build_parser()
    options = argparse.Namespace()
    try:
        _refuse_renamed_options(arguments)
        options, settings = parser.parse_known_args(arguments)
        if settings and not getattr(options, "takes_settings", False):
            parser.error(f"unrecognized arguments: {' '.join(settings)}")
        options.settings = settings
        quieten_libraries()
        module, _, function = options.run.partition(":")
        run = getattr(import_module(f".{module}", __package__), function)
        with warnings.catch_warnings(), _ending_on_sigterm():
            for message in IGNORED_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            return run(options)
    except (UserError, ImportError) as error:  # an ImportError names the extra that is not installed
        print(f"vlv: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of the standard output has ended, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # a full disk, a lost permission, a file system that fails
        what = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        print(f"vlv: {what}{_what_stays(options)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"vlv: interrupted{_what_stays(options)}", file=sys.stderr)
        return 130


def _what_stays(options: argparse.Namespace) -> str:
    """The end of the message of a run that was ended: its output, if that exists, and how to go on or begin anew."""
    given = [getattr(options, name, None) for name in ("output", "output_dir")]
    existing = [Path(output) for output in given if output and os.path.exists(output)]
    outputs = [output for output in existing if output.is_file() or any(output.iterdir())]
    if not outputs:
        return ""
    if options.run.startswith("data:") or getattr(options, "shards", None):
        how = "; the same command goes on with it"
    elif hasattr(options, "resume"):
        how = "; --resume goes on with it"
    else:
        how = "; --overwrite begins anew" if hasattr(options, "overwrite") else ""
    return f"; the results so far are in {outputs[0]}{how}"


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands but `vlv train`. It sets `run` to module and function of the command's work."""
    parser = Parser(
        prog="vlv",
        description="Captions images, and shows what the captioner understood of them. Try: vlv caption FOLDER",
    )
    parser.add_argument("--version", action="version", version=f"vlv {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (caption, reconstruct, encode, score, evaluate, convert, info, push, demo, serve, estimate, data):
        module.add_parser(commands)
    commands.add_parser(
        "train", help="train stage 1 or 3 (images alone) or stage 2 (image-caption pairs)", add_help=False
    )
    return parser


def quieten_libraries() -> None:
    """Turns warnings and progress bars of transformers and diffusers off, but not those of downloads and uploads."""
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub import constants
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    for logging in (transformers_logging, diffusers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    if not constants.HF_HUB_DISABLE_PROGRESS_BARS:  # the loop turns those off, too
        enable_progress_bars()


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """SIGTERM ends the command as an exception does, so that it writes what is finished."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # only that one may handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _refuse_renamed_options(arguments: list[str]) -> None:
    for argument in arguments[1:]:
        old = argument.partition("=")[0]
        if new := RENAMED_OPTIONS.get((arguments[0], old)):
            raise UserError(f"`vlv {arguments[0]} {old}` is now called {new}; pass {new} instead")


def _train(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(TRAIN_USAGE)
        return 0 if arguments else 2
    stage, settings = arguments[0], arguments[1:]
    if stage not in STAGES:
        print(f"vlv: unknown stage {stage!r}\n{TRAIN_USAGE}", file=sys.stderr)
        return 2
    import_module(f"vlv.train.{stage}").main(settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
