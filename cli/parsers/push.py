"""The options of `vlv push`."""

from .common import DTYPE_NAMES


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "push",
        help="upload a model to the Hugging Face Hub",
        description="Uploads a model as one repository that transformers and diffusers both load: captioner, encoder, "
        "text-to-image model, their code, and a model card. After a broken upload the same command continues it. "
        "`--output` writes the same files into a folder and uploads nothing.",
    )
    parser.add_argument("source", metavar="SRC", help="folder of a model, stage-1 or stage-2 checkpoint, or repo id")
    parser.add_argument("repo", metavar="ORG/NAME", help="the repository; created if it does not exist")
    parser.add_argument(
        "--diffusion-model", metavar="DIR_OR_REPO", help="the text-to-image model, if SRC does not hold one"
    )
    parser.add_argument(
        "--by-reference",
        action="store_true",
        help="leave the text-to-image model in its own repository of the Hub, which the uploaded one names with its "
        "commit, in place of copying it",
    )
    parser.add_argument("--private", action="store_true", help="create the repository as a private one")
    parser.add_argument("--revision", help="branch to upload to; created if it does not exist (default: main)")
    parser.add_argument("--token", help="Hub token; by default HF_TOKEN or the one that `hf auth login` stored")
    parser.add_argument(
        "--dtype", choices=DTYPE_NAMES, help="store the weights in this precision (default: as in SRC)"
    )
    parser.add_argument(
        "--half-variant", action="store_true", help='also store the weights in half precision, for variant="fp16"'
    )
    parser.add_argument("--message", help="commit message")
    parser.add_argument(
        "--results",
        metavar="FILE",
        help="JSON with metrics for the card, as `vlv evaluate` writes it: {subject: {metric: value}}",
    )
    parser.add_argument("--results-command", metavar="TEXT", help="the command that printed the metrics")
    parser.add_argument("--license", help="licence identifier of the Hub for the repository")
    parser.add_argument(
        "--replace-card",
        action="store_true",
        help="write a new model card even if the card was edited on the Hub (by default the edited card is kept, and "
        "only --results and --license change it)",
    )
    parser.add_argument("--output", metavar="DIR", help="write the repository into this folder and upload nothing")
    parser.set_defaults(run="push:run")
