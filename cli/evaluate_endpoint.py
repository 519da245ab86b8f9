"""`vlv evaluate judge`, `vqa` and `agreement`: protocols that ask a model behind an endpoint."""

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .errors import UserError

PROTOCOLS = {
    "judge": "a vision model scores captions from 0 to 6, or compares two captioners (docs/evaluation_protocols.md)",
    "vqa": "a language model answers questions about images from their captions (docs/evaluation_protocols.md)",
}


def add_endpoint_parsers(subjects: Any) -> None:
    """Adds the commands to those of `vlv evaluate`."""
    for name, text in PROTOCOLS.items():
        parser = subjects.add_parser(
            name,
            help=text.partition(" (")[0],
            usage=f"vlv evaluate {name} CONFIG.yaml [--name value ...]",
            add_help=False,
        )
        parser.set_defaults(run=run_protocol, takes_settings=True, protocol=name)
    agreement = subjects.add_parser(
        "agreement",
        help="of two judges' scores of the same captions",
        description="Agreement of two judges: Cohen's kappa with squared weights, and the share of equal scores.",
    )
    agreement.add_argument("results", nargs=2, type=Path, metavar="RESULTS", help="results.json of vlv evaluate judge")
    agreement.set_defaults(run=run_agreement)


def run_protocol(arguments: argparse.Namespace) -> int:
    from vlv.evaluation.endpoint import EndpointError, PriceReached
    from vlv.evaluation.protocols import JudgeConfig, VQAConfig, run_judge, run_vqa
    from vlv.train.parsing import parse_config

    program = f"vlv evaluate {arguments.protocol}"
    try:
        with tqdm(unit="answer", disable=None) as bar:
            if arguments.protocol == "judge":
                table = run_judge(parse_config(JudgeConfig, arguments.settings, program), bar.update)
            else:
                table = run_vqa(parse_config(VQAConfig, arguments.settings, program), bar.update)
        print(table)
    except (ValueError, EndpointError, PriceReached) as error:
        raise UserError(str(error)) from error
    return 0


def run_agreement(arguments: argparse.Namespace) -> int:
    from vlv.evaluation.protocols import describe_agreement

    try:
        print(describe_agreement(*arguments.results))
    except ValueError as error:
        raise UserError(str(error)) from error
    return 0
