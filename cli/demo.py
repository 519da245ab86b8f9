"""`vlv demo`: the Gradio page, on this machine or as a Space."""

import argparse
from pathlib import Path

from vlv.errors import UserError
from vlv.pipelines.schedulers import OWN
from vlv.space.deploy import push_space, write_space

from .address import check_address, port_in_use
from .choosing import check_min_score, choose_min_score
from .models import choose_device, choose_model, loading, precision, use_scheduler
from .push import check_repo_id, talking_to_the_hub


def run(arguments: argparse.Namespace) -> int:
    check_min_score(arguments)
    if arguments.push_space or arguments.write_space:
        return _deploy(arguments)
    check_address(arguments.host, arguments.port)
    try:
        return _serve(arguments)
    except KeyboardInterrupt:
        return 130


def _serve(arguments: argparse.Namespace) -> int:
    try:
        from vlv.space.app import Demo, launch
    except ImportError as error:
        raise UserError(
            f"the page needs the extra vlv[space] (pip install '.[space]' in its source folder): {error}"
        ) from error
    source = choose_model(arguments)
    choose_min_score(arguments, source)
    with loading(source):
        device, dtype = choose_device(arguments), precision(arguments)
        demo = Demo(source, arguments.revision, device, dtype, arguments.min_score)
    if arguments.scheduler != OWN:
        if demo.pipeline is None:
            raise UserError(
                f"--scheduler {arguments.scheduler}: {source} has no diffusion model, so it generates no images"
            )
        use_scheduler(demo.pipeline, arguments.scheduler)
    try:
        launch(demo, server_name=arguments.host, server_port=arguments.port or None)
    except OSError as error:  # something took the port while the model was loaded
        raise port_in_use(arguments.port) from error
    return 0


def _deploy(arguments: argparse.Namespace) -> int:
    if not arguments.model or Path(arguments.model).exists():
        raise UserError("a Space takes its model from the Hub: push it (`vlv push`), then pass --model ORG/NAME")
    if arguments.scheduler != OWN:
        raise UserError("a Space takes the model's own scheduler; leave --scheduler out")
    if arguments.push_space and arguments.write_space:
        raise UserError("give --push-space or --write-space, not both")
    check_repo_id(arguments.model)
    choose_min_score(arguments, arguments.model)
    if arguments.write_space:
        try:
            write_space(arguments.write_space, arguments.model)
        except (OSError, ValueError) as error:
            raise UserError(f"--write-space {error}") from error
        variables = f"MODEL_ID={arguments.model}"
        if arguments.revision:
            variables += f" and MODEL_REVISION={arguments.revision}"
        if arguments.confidence:
            variables += f" and MIN_SCORE={arguments.min_score:g}"
        print(f"written to {arguments.write_space}; set the Space's variables {variables}")
        return 0
    check_repo_id(arguments.push_space)
    with talking_to_the_hub(arguments.push_space):
        url = push_space(
            arguments.push_space,
            arguments.model,
            revision=arguments.revision,
            min_score=arguments.min_score,
            private=arguments.private,
            token=arguments.token,
        )
    print(f"pushed: {url}")
    return 0
