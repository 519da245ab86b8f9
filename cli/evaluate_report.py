"""`vlv evaluate report`: one HTML page of the results of evaluations."""

import argparse
from pathlib import Path
from typing import Any

from .errors import UserError
from .inputs import positive
from .output import output_path, refuse_existing


def add_report_parser(subjects: Any) -> None:
    """Adds the command to those of `vlv evaluate`."""
    parser = subjects.add_parser(
        "report",
        help="one HTML page of the results of the other commands",
        description="Writes one HTML page of the results of the other commands of `vlv evaluate` and of `vlv score`: "
        "tables with intervals, charts, the best and the worst images, settings and versions. The page holds its "
        "images and loads nothing from elsewhere.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="files of results, or folders of runs")
    parser.add_argument("--output", default="report.html", help="the HTML file (default: report.html)")
    parser.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    parser.add_argument("--title", default="Evaluation", help="title of the page (default: Evaluation)")
    parser.add_argument(
        "--images", metavar="DIR", help="folder of the evaluated images, where the results do not name it"
    )
    parser.add_argument("--captions", metavar="FILE", help="the captions that `vlv score` scored")
    parser.add_argument(
        "--rank-by", metavar="KEY", help="figure that best and worst images are chosen by, such as cosine or cider_d"
    )
    parser.add_argument(
        "--cases", type=positive, default=8, help="best images that are shown, and as many worst (default: 8)"
    )
    parser.set_defaults(run=run)


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
