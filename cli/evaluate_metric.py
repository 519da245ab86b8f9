"""`vlv evaluate metric`: a metric as a Space of the Hub, for `evaluate.load`."""

import argparse

from vlv.errors import UserError

from .push import check_repo_id, talking_to_the_hub


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
