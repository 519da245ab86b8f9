"""The options of `vlv caption`."""

from .choice import add_choice_arguments
from .common import add_embeddings_cache, add_model_arguments, positive
from .shards import add_shard_arguments, add_speed_arguments


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "caption",
        help="write captions of images",
        description="Writes captions of images as JSON: {path relative to the argument: caption}. Folders are "
        "searched recursively. The file is complete JSON at every moment. An image that cannot be read is named on "
        "standard error, the other images are captioned, and the exit code is 1. A file beside the output, such as "
        "captions.resume.jsonl, records what --resume goes on with.",
    )
    parser.add_argument("paths", nargs="*", metavar="PATH", help="image files and folders")
    parser.add_argument("--embeddings", metavar="FILE", help="caption embeddings from `vlv encode`, instead of images")
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help='instruction to a model that was trained to follow it, such as "as tags" (`vlv info` lists them); other '
        "words are the beginning of the captions",
    )
    parser.add_argument("--output", default="captions.json", help="the JSON file (default: captions.json)")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        action="store_true",
        help="go on with --output: keep the captions of images that have not changed, add the others",
    )
    existing.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    parser.add_argument(
        "--batch-size", type=positive, default=8, help="captions that are written together (default: 8)"
    )
    parser.add_argument(
        "--encoder-batch-size", type=positive, metavar="N", help="images in a pass of the encoder (default: 8)"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=300, help="most tokens of a caption (default: 300, as the paper)"
    )
    parser.add_argument("--num-beams", type=positive, default=1, help="beams; 1 is greedy (default: 1)")
    parser.add_argument("--trim", action="store_true", help="remove an unfinished last sentence and repetitions")
    parser.add_argument(
        "--as-original",
        action="store_true",
        help="settings of the authors' Caption_inference.py: 4 beams, at most 300 tokens, the prefix rounded to "
        "bfloat16, --trim (docs/from_the_original.md)",
    )
    add_choice_arguments(parser)
    add_embeddings_cache(parser)
    add_speed_arguments(parser)
    add_model_arguments(parser)
    add_shard_arguments(parser)
    parser.set_defaults(run="caption:run")
