"""`vlv evaluate`: metrics of a model, printed and written as JSON."""

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from vlv.files import write_json

from .inputs import positive
from .models import choose_model
from .output import output_path, refuse_existing


def add_parser(commands) -> None:
    parser = commands.add_parser("evaluate", help="measure a model", description="Measures a model.")
    subjects = parser.add_subparsers(title="what to evaluate", metavar="WHAT", required=True)
    miniature = subjects.add_parser(
        "miniature",
        help="every part of the embedded miniature",
        description="Measures every part of the miniature with a scene classifier, on scenes that no part was trained "
        "on. Prints the metrics of each part when they are measured, and at the end a table of all metrics, of the "
        "goals that they reach, and of how well captions follow instructions. Takes about 20 minutes on two cores.",
    )
    miniature.add_argument("--model", metavar="DIR", help="folder of a miniature (default: the embedded one)")
    miniature.add_argument("--output", default="evaluation.json", help="the JSON file (default: evaluation.json)")
    miniature.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    miniature.add_argument("--scenes", type=positive, default=500, help="scenes of each split (default: 500)")
    miniature.add_argument(
        "--num-inference-steps", type=positive, default=25, help="denoising steps of each image (default: 25)"
    )
    miniature.add_argument(
        "--captions-only", action="store_true", help="measure captions and instructions alone, in about two minutes"
    )
    miniature.set_defaults(run=run_miniature)


def run_miniature(arguments: argparse.Namespace) -> int:
    from vlv.miniature.evaluation import evaluate_captions, evaluate_miniature
    from vlv.miniature.metrics import goals_table, instructions_table, scores_table

    output = output_path(arguments.output, ".json")
    if not arguments.overwrite:
        refuse_existing(output, "--output")
    folder = choose_model(arguments)
    found: dict[str, Any] = {}

    def record(part: str, metrics: Mapping[str, Any]) -> None:
        values = ", ".join(f"{name} {value}" for name, value in metrics.items())
        print(f"{part}: {values}", file=sys.stderr, flush=True)
        found[part] = metrics
        write_json(output, found)

    if arguments.captions_only:
        evaluate_captions(folder, record, n=arguments.scenes)
    else:
        evaluate_miniature(folder, record, n=arguments.scenes, steps=arguments.num_inference_steps)
    tables = [scores_table(found), goals_table(found), instructions_table(found)]
    print("\n\n".join([*filter(None, tables), f"written to {output}"]))
    return 0
