"""`vlv evaluate judge`, `vqa` and `agreement`: protocols that ask a model behind an endpoint."""

import argparse

from tqdm import tqdm

from vlv.errors import UserError


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
