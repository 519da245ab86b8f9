"""`vlv evaluate metric`: a metric as a Space of the Hub, for `evaluate.load`."""

import argparse
from typing import Any

from .errors import UserError
from .push import check_repo_id, talking_to_the_hub


def add_metric_parser(subjects: Any) -> None:
    """Adds the command to those of `vlv evaluate`."""
    parser = subjects.add_parser(
        "metric",
        help="write or push a metric as a Space, for the library evaluate",
        description="Writes or pushes the Space of a metric: its script, a page that computes it, its card and its "
        'requirements. `evaluate.load("ORG/NAME")` then loads it anywhere. Without an option, lists the metrics.',
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="of the metric, such as cider_d")
    parser.add_argument("--write-space", metavar="DIR", help="write the Space's files into this new folder")
    parser.add_argument("--push-space", metavar="ORG/NAME", help="create or update this Space on the Hub")
    parser.add_argument("--private", action="store_true", help="create the Space as a private one")
    parser.add_argument("--token", help="Hub token; by default HF_TOKEN or the one that `hf auth login` stored")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from vlv.space.metric_space import metric_names, push_metric_space, write_metric_space

    name = arguments.name
    if name is None:
        print("\n".join(metric_names()))
        return 0
    if bool(arguments.write_space) == bool(arguments.push_space):
        raise UserError("give one of --write-space DIR and --push-space ORG/NAME")
    try:
        if arguments.write_space:
            write_metric_space(name, arguments.write_space)
            print(f"written to {arguments.write_space}")
            return 0
        check_repo_id(arguments.push_space)
        with talking_to_the_hub(arguments.push_space):
            url = push_metric_space(arguments.push_space, name, private=arguments.private, token=arguments.token)
    except ValueError as error:
        raise UserError(str(error)) from error
    print(f"pushed: {url}")
    return 0
