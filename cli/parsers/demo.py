"""The options of `vlv demo`."""

from .choice import add_min_score
from .common import add_model_arguments, add_scheduler_argument


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
    add_scheduler_argument(parser)
    add_model_arguments(parser)
    parser.set_defaults(run="demo:run")
