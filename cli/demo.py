"""`vlv demo`: the Gradio page, on this machine."""

import argparse

from .errors import UserError
from .models import add_model_arguments, choose_device, choose_model, loading, precision


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="a web page to caption, reconstruct and mix images",
        description="Serves a web page on this machine: captions, reconstructions, pictures mixed from two images. "
        "The same page runs as a Hugging Face Space (space/ in the repository).",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=7860, help="default: 7860; 0 takes a free one")
    add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    try:
        from vlv.space.app import Demo, launch
    except ImportError as error:
        raise UserError(f"the page needs gradio: pip install 'vlv[space]' ({error})") from error
    source = choose_model(arguments)
    with loading(source):
        demo = Demo(source, arguments.revision, choose_device(arguments), precision(arguments))
    launch(demo, server_name=arguments.host, server_port=arguments.port or None, quiet=False)
    return 0
