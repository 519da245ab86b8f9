"""`vlv demo`: the Gradio page, on this machine or as a Space."""

import argparse
from pathlib import Path

from vlv.space.deploy import push_space, write_space

from .address import check_address, port_in_use
from .choosing import add_min_score, check_min_score, choose_min_score
from .errors import UserError
from .models import add_model_arguments, choose_device, choose_model, loading, precision
from .push import check_repo_id, talking_to_the_hub


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="serve a web page that captions, reconstructs and mixes images",
        description="Serves a web page on this machine, with captions, reconstructions and images mixed from two "
        "images. --push-space uploads the same page to the Hugging Face Hub as a Space, for a --model on the Hub.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on; 0 takes a free one (default: 7860)")
    parser.add_argument(
        "--confidence",
        action="store_true",
        help="mark captions that explain the image hardly better than no words, as `vlv caption --confidence`",
    )
    add_min_score(parser)
    space = parser.add_argument_group("as a Space", "These options write or upload a Space and serve nothing.")
    space.add_argument("--push-space", metavar="ORG/NAME", help="create or update this Space on the Hub")
    space.add_argument("--write-space", metavar="DIR", help="write the Space's files into this new folder")
    space.add_argument("--private", action="store_true", help="create the Space as a private one")
    space.add_argument("--token", help="Hub token; by default HF_TOKEN or the one that `hf auth login` stored")
    add_model_arguments(parser)
    parser.set_defaults(run=run)


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
    try:
        launch(demo, server_name=arguments.host, server_port=arguments.port or None)
    except OSError as error:  # something took the port while the model was loaded
        raise port_in_use(arguments.port) from error
    return 0


def _deploy(arguments: argparse.Namespace) -> int:
    if not arguments.model or Path(arguments.model).exists():
        raise UserError("a Space takes its model from the Hub: push it (`vlv push`), then pass --model ORG/NAME")
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
