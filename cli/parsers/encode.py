"""The options of `vlv encode`."""

from .common import add_model_arguments, positive


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "encode",
        help="write caption embeddings of images",
        description="Writes caption embeddings of images into a safetensors file: one tensor (tokens, width) for each "
        "image, named by its path relative to the argument. `vlv caption --embeddings` and `vlv reconstruct "
        "--embeddings` read the file.",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="image files and folders")
    parser.add_argument("--output", default="z.safetensors", help="the safetensors file (default: z.safetensors)")
    parser.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    parser.add_argument("--batch-size", type=positive, default=8, help="images in a batch (default: 8)")
    parser.add_argument(
        "--for",
        dest="use",
        choices=("caption", "reconstruct"),
        help="the command that reads the embeddings; required for a model with two encoders, such as `vlv convert` "
        "makes from both stages of the authors' code",
    )
    add_model_arguments(parser)
    parser.set_defaults(run="encode:run")
