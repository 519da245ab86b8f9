"""The command `vlv`."""

import argparse
import sys
from collections.abc import Sequence

from vlv.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0 done, 1 some inputs failed, 2 nothing could be done."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["train"]:  # has its own way with arguments: a YAML file and overrides
        return _train(given[1:])
    from huggingface_hub import constants
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    from . import caption, convert, demo, encode, evaluate, info, push, reconstruct
    from .errors import UserError

    parser = argparse.ArgumentParser(
        prog="vlv", description="Caption images, and see what the captioner understood. Try: vlv caption FOLDER"
    )
    parser.add_argument("--version", action="version", version=f"vlv {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (caption, reconstruct, encode, evaluate, convert, info, push, demo):
        module.add_parser(commands)
    commands.add_parser("train", help="train stage 1 (images alone) or stage 2 (image-caption pairs)", add_help=False)
    options = parser.parse_args(given)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not constants.HF_HUB_DISABLE_PROGRESS_BARS:  # the line above silences downloads and uploads, too
        enable_progress_bars()
    try:
        return options.run(options)
    except (UserError, ImportError) as error:  # the second: an extra is not installed, and the message says which
        print(f"vlv: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vlv: interrupted; what was finished is on disk", file=sys.stderr)
        return 130


def _train(given: list[str]) -> int:
    usage = (
        "usage: vlv train {stage1,stage2} CONFIG.yaml [--name value ...]    (vlv train stage1 --help lists the names)"
    )
    if not given or given[0] in ("-h", "--help"):
        print(usage)
        return 0 if given else 2
    stage, rest = given[0], given[1:]
    if stage not in ("stage1", "stage2"):
        print(f"vlv: unknown stage {stage!r}\n{usage}", file=sys.stderr)
        return 2
    if stage == "stage1":
        from vlv.train.stage1 import main as train
    else:
        from vlv.train.stage2 import main as train
    train(rest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
