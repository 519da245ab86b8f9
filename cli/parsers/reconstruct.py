"""The options of `vlv reconstruct`."""

from vlv.pipelines.schedulers import DEFAULT_SCHEDULER, DEFAULT_STEPS, MANY_STEPS, OWN

from .common import add_embeddings_cache, add_model_arguments, add_scheduler_argument, positive


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "reconstruct",
        help="generate images from the caption embeddings of images",
        description="Writes OUTPUT_DIR/reconstructions/, OUTPUT_DIR/side_by_side/ (original and reconstruction) and "
        "OUTPUT_DIR/metrics.json. The noise of every image comes from the same seed, so a reconstruction does not "
        "depend on the other images.",
    )
    parser.add_argument("paths", nargs="*", metavar="PATH", help="image files and folders")
    parser.add_argument("--embeddings", metavar="FILE", help="caption embeddings from `vlv encode`, instead of images")
    parser.add_argument("--output-dir", default="reconstructions", help="a folder (default: reconstructions)")
    parser.add_argument("--overwrite", action="store_true", help="replace files in --output-dir, and --sheet")
    parser.add_argument(
        "--sheet", metavar="FILE.png", help="also write one image of all: originals above their reconstructions"
    )
    parser.add_argument("--captions", metavar="FILE", help="captions from `vlv caption`, to print on the sheet")
    parser.add_argument(
        "--guidance-scale", type=float, default=2.0, help="classifier-free guidance; 1 turns it off (default: 2.0)"
    )
    parser.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("START", "END"),
        default=(0.0, 1.0),
        help="the part of the steps with guidance, from 0, the first, to 1, the end; the others take half the time "
        "(default: 0 1)",
    )
    add_scheduler_argument(parser, None, f"{DEFAULT_SCHEDULER}, or {OWN} where that does not fit the model")
    parser.add_argument(
        "--num-inference-steps",
        type=positive,
        help="denoising steps (default: "
        + ", ".join(f"{steps} with {name}" for name, steps in DEFAULT_STEPS.items())
        + f", otherwise {MANY_STEPS})",
    )
    parser.add_argument("--no-metrics", action="store_true", help="do not compare the images with their originals")
    parser.add_argument("--seed", type=int, default=42, help="seed of the noise of every image (default: 42)")
    parser.add_argument(
        "--image-size", type=positive, help="width and height in pixels (default: the size used in training)"
    )
    parser.add_argument("--prompt", help="words beside the images, after their embeddings, such as 'a red car'")
    parser.add_argument("--prompt-first", action="store_true", help="place --prompt before the embeddings")
    parser.add_argument(
        "--image-tokens",
        type=int,
        metavar="N",
        help="keep the first N caption embeddings of each image; 0 for the words of --prompt alone (default: all)",
    )
    parser.add_argument("--negative-prompt", help="text that the reconstructions are steered away from")
    parser.add_argument("--batch-size", type=positive, default=8, help="images in a batch (default: 8)")
    add_embeddings_cache(parser)
    add_model_arguments(parser)
    parser.set_defaults(run="reconstruct:run")
