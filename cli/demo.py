"""`vlv demo`: the Gradio page, on this machine or as a Space."""

import argparse
from pathlib import Path

from vlv.space.deploy import push_space, write_space

from .address import check_address, port_in_use
from .errors import UserError
from .models import add_model_arguments, choose_device, choose_model, loading, precision
from .push import check_repo_id, talking_to_the_hub
from .scheduling import OWN, add_scheduler_argument, use_scheduler


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="serve a web page that captions, reconstructs and mixes images",
        description="Serves a web page on this machine, with captions, reconstructions and images mixed from two "
        "images. --push-space uploads the same page to the Hugging Face Hub as a Space, for a --model on the Hub.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on; 0 takes a free one (default: 7860)")
    space = parser.add_argument_group("as a Space", "These options write or upload a Space and serve nothing.")
    space.add_argument("--push-space", metavar="ORG/NAME", help="create or update this Space on the Hub")
    space.add_argument("--write-space", metavar="DIR", help="write the Space's files into this new folder")
    space.add_argument("--private", action="store_true", help="create the Space as a private one")
    space.add_argument("--token", help="Hub token; by default HF_TOKEN or the one that `hf auth login` stored")
    add_scheduler_argument(parser)
    add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
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
    with loading(source):
        demo = Demo(source, arguments.revision, choose_device(arguments), precision(arguments))
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
    if arguments.write_space:
        try:
            write_space(arguments.write_space, arguments.model)
        except (OSError, ValueError) as error:
            raise UserError(f"--write-space {error}") from error
        variables = f"MODEL_ID={arguments.model}"
        if arguments.revision:
            variables += f" and MODEL_REVISION={arguments.revision}"
        print(f"written to {arguments.write_space}; set the Space's variables {variables}")
        return 0
    check_repo_id(arguments.push_space)
    with talking_to_the_hub(arguments.push_space):
        url = push_space(
            arguments.push_space,
            arguments.model,
            revision=arguments.revision,
            private=arguments.private,
            token=arguments.token,
        )
    print(f"pushed: {url}")
    return 0
