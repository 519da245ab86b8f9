"""`vlv evaluate report`: one HTML page of the results of evaluations."""

import argparse

from vlv.captioning.output import output_path, refuse_existing
from vlv.errors import UserError


def run(arguments: argparse.Namespace) -> int:
    from vlv.evaluation.report import ReportSettings, write_report

    output = output_path(arguments.output, ".html")
    if not arguments.overwrite:
        refuse_existing(output, "--output")
    try:
        settings = ReportSettings(arguments.images, arguments.captions, arguments.rank_by, arguments.cases)
        sections = write_report(arguments.runs, output, arguments.title, settings)
    except ValueError as error:
        raise UserError(str(error)) from error
    for section in sections:
        print(f"{section.title}: {section.summary}")
    print(f"written to {output} ({output.stat().st_size / 1e6:.1f} MB)")
    return 0
