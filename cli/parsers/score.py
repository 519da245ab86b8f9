"""The options of `vlv score`."""

from .common import add_model_arguments, add_num_pairs, positive


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "score",
        help="score captions by how well they explain images",
        description="Writes the diffusion score of captions as JSON: {path relative to the argument: score}, with a "
        "list where an image has several captions. The score is the denoising loss of the image under no words, less "
        "that under the caption's words, by the frozen text-to-image model: above 0, the words explain something of "
        "the image. No image is generated. Scores of different models cannot be compared. An image that cannot be "
        "read or has no caption is named on standard error, the others are scored, and the exit code is 1.",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="image files and folders")
    parser.add_argument(
        "--captions", required=True, metavar="FILE", help="JSON of `vlv caption`: {path: caption or list of captions}"
    )
    parser.add_argument("--output", default="scores.json", help="the JSON file (default: scores.json)")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        action="store_true",
        help="go on with --output: keep the scores of images that have not changed, add the others",
    )
    existing.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    parser.add_argument("--batch-size", type=positive, default=8, help="images in a batch (default: 8)")
    add_num_pairs(parser)
    add_model_arguments(parser)
    parser.set_defaults(run="score:run")
