"""`vlv evaluate`: figures of a model, printed and written as JSON."""

import argparse


def add_parser(commands) -> None:
    parser = commands.add_parser("evaluate", help="measure a model", description="Measures a model.")
    subjects = parser.add_subparsers(title="what to evaluate", metavar="WHAT", required=True)
    miniature = subjects.add_parser(
        "miniature",
        help="everything in the embedded miniature",
        description="Measures every part of the miniature on scenes it never saw, by an independent recogniser.",
    )
    miniature.add_argument("--model", metavar="DIR", help="folder of a miniature; by default the embedded one")
    miniature.add_argument("--output", default="evaluation.json", help="the JSON file (default: evaluation.json)")
    miniature.add_argument("--scenes", type=int, default=500, help="scenes of each split (default: 500)")
    miniature.set_defaults(run=run_miniature)


def run_miniature(arguments: argparse.Namespace) -> int:
    raise NotImplementedError
