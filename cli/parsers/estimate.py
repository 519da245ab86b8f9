"""The options of `vlv estimate`."""

from .common import positive


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "estimate",
        usage="vlv estimate CONFIG.yaml --gpu H100 --count 8 [--price 2.5] [--utilization 0.35] [--name value ...]",
        help="FLOPs, hours, price and memory of a training, from its configuration",
        description="Prints what a training costs before it starts: FLOPs of each part of the model, images a second, "
        "hours, price, and memory of one card. The models are built at full size without weights (PyTorch's meta "
        "device), one step runs on them, and PyTorch's counter counts it: what is frozen, recomputed and in which "
        "precision follows from CONFIG.yaml. Takes about 10 seconds and needs no GPU, no weights and no network.",
        epilog="Any other --name value overrides a setting of CONFIG.yaml, as in `vlv train`: --encoder_image_size "
        "384, --bf16 true, --max_steps 50000. Models are those of the paper by their repo ids (Florence-2-large and "
        "-base, Stable Diffusion 2.1, XL, 3 and 3.5, Qwen2.5-3B, -1.5B, -0.5B), or folders with a config.json or, of "
        "a text-to-image model, a model_index.json. Of stage 3, samples and scores of "
        "the rounds are counted, too. Validation, saving, waiting for data and communication between cards are not.",
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="the training's configuration")
    parser.add_argument(
        "--stage", type=int, choices=(1, 2, 3), help="default: found from the configuration's settings"
    )
    parser.add_argument(
        "--stage2",
        metavar="RECIPE.yaml",
        help="stage 3: the recipe of stage 2 that will make its model, where that does not exist (default: the one of "
        "this output_dir beside CONFIG.yaml or its folder)",
    )
    parser.add_argument("--gpu", default="H100", help="the card (default: H100); an unknown name lists those known")
    parser.add_argument("--count", type=positive, default=8, help="number of cards (default: 8)")
    parser.add_argument("--price", type=float, default=2.5, help="dollars for a card and an hour (default: 2.5)")
    parser.add_argument(
        "--utilization",
        metavar="[PART=]SHARE",
        action="append",
        default=[],
        help="share of the card's peak speed that the computation reaches (default: 0.35); PART=SHARE sets it for one "
        "part, such as --utilization vision_tower=0.2",
    )
    parser.add_argument("--tf32", action="store_true", help="float32 matrix products use TF32")
    parser.add_argument("--cached-moments", action="store_true", help="the autoencoder's moments come from a cache")
    parser.add_argument("--cached-vision-features", action="store_true", help="the vision tower's features do, too")
    parser.add_argument("--caption-tokens", type=positive, help="longest caption of a batch (default: the greatest)")
    parser.add_argument(
        "--samples", type=positive, help="size of the data, for num_train_epochs and the rounds of stage 3"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run="estimate:run", takes_settings=True)
