"""The options of `vlv convert`."""

from .common import positive


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "convert",
        help="convert checkpoints of the authors' code",
        description="Converts a stage-1 checkpoint, a stage-2 checkpoint, or both, as the authors' code saves them, "
        "into one folder that `vlv caption`, `vlv reconstruct`, `vlv train` and `vlv push` read. Every weight that is "
        "not used is listed with the reason. Without a checkpoint, converts Microsoft's Florence-2 for `vlv train "
        "stage1 --image_encoder`. Needs neither a network nor the authors' code.",
    )
    parser.add_argument(
        "--stage1",
        metavar="FILE_OR_DIR",
        help="pytorch_model.bin that DeepSpeed's zero_to_fp32.py wrote, checkpoint_N.pt, or a folder with one",
    )
    parser.add_argument("--stage2", metavar="FILE_OR_DIR", help="model.pt, or the folder with it and its tokenizer")
    parser.add_argument("--stable-diffusion", metavar="DIR", help="the diffusers folder used in training")
    parser.add_argument(
        "--florence", metavar="DIR", required=True, help="the Florence-2 folder, Microsoft's or transformers'"
    )
    parser.add_argument("--language-model", metavar="DIR", help="the language model's folder, for --stage2")
    parser.add_argument(
        "--image-size",
        type=positive,
        metavar="PIXELS",
        help="the image size of the authors' training script (default: 384, or the text-to-image model's own size if "
        "that is smaller)",
    )
    parser.add_argument("--output", metavar="DIR", required=True, help="a new folder")
    parser.set_defaults(run="convert:run")
