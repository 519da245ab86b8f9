"""The options of `vlv evaluate`."""

import argparse
from pathlib import Path
from typing import Any

from .common import not_negative, positive
from .references import add_reference_arguments
from .results import add_compare_parser, add_metric_parser, add_report_parser

SCENE_CLASSIFIER, INCEPTION = "scene-classifier", "inception"
PAIR_METRICS = ("psnr", "ssim", "cosine", "lpips", "dreamsim", "scenes")
GENERATING_PROTOCOLS = {
    "cycle": "captions by the images that a text-to-image model generates from them (Table 1 of the paper)",
    "reconstruction": "images that are generated from caption embeddings, by their originals (Table 5)",
    "spatial": "where the objects of such images are, against those of the originals (Table 6)",
    "composition": "images that are generated from the caption embeddings of two images (Figure 6)",
}
PROTOCOLS = {
    "judge": "a vision model scores captions from 0 to 6, or compares two captioners (docs/evaluation_protocols.md)",
    "vqa": "a language model answers questions about images from their captions (docs/evaluation_protocols.md)",
}


def add_parser(commands) -> None:
    parser = commands.add_parser("evaluate", help="measure a model, images or captions", description="Measures.")
    subjects = parser.add_subparsers(title="what to evaluate", metavar="WHAT", required=True)
    miniature = subjects.add_parser(
        "miniature",
        help="every part of the embedded miniature",
        description="Measures every part of the miniature with a scene classifier, on scenes that no part was trained "
        "on. Prints the metrics of each part when they are measured, and at the end a table of all metrics, of the "
        "goals that they reach, and of how well captions follow instructions. Takes about 20 minutes on two cores.",
    )
    miniature.add_argument("--model", metavar="DIR", help="folder of a miniature (default: the embedded one)")
    miniature.add_argument("--output", default="evaluation.json", help="the JSON file (default: evaluation.json)")
    miniature.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    miniature.add_argument("--scenes", type=positive, default=500, help="scenes of each split (default: 500)")
    miniature.add_argument(
        "--num-inference-steps", type=positive, default=25, help="denoising steps of each image (default: 25)"
    )
    miniature.add_argument(
        "--images-dir",
        metavar="DIR",
        help="a new folder that keeps originals, reconstructions and captions of each split, on which the other "
        "commands of `vlv evaluate` give the same figures; prints their distances, too",
    )
    miniature.add_argument(
        "--captions-only", action="store_true", help="measure captions and instructions alone, in about two minutes"
    )
    miniature.set_defaults(run="evaluate:run_miniature")
    _add_images_parser(subjects)
    _add_captions_parser(subjects)
    _add_generating_parsers(subjects)
    _add_endpoint_parsers(subjects)
    add_compare_parser(subjects)
    add_report_parser(subjects)
    add_metric_parser(subjects)


def _add_images_parser(subjects) -> None:
    images = subjects.add_parser(
        "images",
        help="a folder of generated images against reference images",
        description="Measures how far a set of generated images is from a set of reference images (Fréchet distance, "
        "kernel distance, Gaussian MMD of their features) and, where both folders have images of the same names, how "
        "similar each is to its original. docs/evaluation_metrics.md defines each metric.",
    )
    images.add_argument("--generated", required=True, metavar="DIR", help="folder of generated images")
    images.add_argument("--reference", metavar="DIR", help="folder of reference images")
    images.add_argument(
        "--features",
        default=INCEPTION,
        metavar="MODEL",
        help="what is compared: inception (FID, KID; the default), scene-classifier (the miniature's), or the folder "
        "or Hub repo id of a vision model of transformers, such as facebook/dinov2-large or "
        "openai/clip-vit-large-patch14",
    )
    images.add_argument(
        "--resize",
        choices=("pytorch-fid", "clean-fid", "torch-fidelity"),
        default="pytorch-fid",
        help="how images are resized for Inception (default: pytorch-fid); FID differs between them",
    )
    images.add_argument(
        "--pair-metrics",
        nargs="*",
        choices=PAIR_METRICS,
        metavar="NAME",
        default=["psnr", "ssim", "cosine"],
        help="metrics of each image and its original: psnr, ssim, cosine (of the features), lpips, dreamsim, "
        "and scenes, of --features scene-classifier (default: the first three); none without a name",
    )
    for kind in ("generated", "reference"):
        images.add_argument(
            f"--{kind}-statistics",
            metavar="FILE",
            help=f"statistics of the features of the {kind} images, a .safetensors file: read if it exists, else "
            "written; one of other images or features is refused"
            + (" (without --reference, also a .npz file of pytorch-fid)" if kind == "reference" else ""),
        )
    images.add_argument("--batch-size", type=positive, default=32, help="images in a batch (default: 32)")
    images.add_argument("--device", help="such as cpu, cuda or mps (default: cuda or mps if available, else cpu)")
    _add_result_arguments(images, "image_metrics.json", "default: 1000 for means, 100 for distances of sets")
    images.set_defaults(run="evaluate:run_images")


def _add_captions_parser(subjects) -> None:
    captions = subjects.add_parser(
        "captions",
        help="a file of captions against references, images or objects",
        description="Measures captions: against references (CIDEr-D, BLEU, ROUGE-L, METEOR, BERTScore), images "
        "(CLIPScore) and objects (CHAIR), and by themselves (length, repetition, distinct-n). What is given decides "
        "what is measured. docs/evaluation_metrics.md defines each metric.",
    )
    captions.add_argument(
        "--captions", required=True, metavar="FILE", help="JSON: {image: caption}, as `vlv caption` writes it"
    )
    add_reference_arguments(captions)
    captions.add_argument("--images", metavar="DIR", help="folder of the images, for CLIPScore")
    captions.add_argument(
        "--read-scenes",
        action="store_true",
        help="captions and references describe scenes of the miniature: measure how well the scenes agree",
    )
    captions.add_argument(
        "--tokenizer",
        metavar="MODEL",
        help="folder or Hub repo id of the tokenizer that the captions were written with, for the share that ended by "
        "themselves",
    )
    captions.add_argument(
        "--max-new-tokens", type=positive, default=300, help="the limit that they were written with (default: 300)"
    )
    captions.add_argument(
        "--batch-size", type=positive, default=32, help="images, or texts of --bert, in a batch (default: 32)"
    )
    captions.add_argument("--device", help="such as cpu, cuda or mps (default: cuda or mps if available, else cpu)")
    _add_result_arguments(captions, "caption_metrics.json", "default: 1000")
    captions.set_defaults(run="evaluate:run_captions")


def _add_result_arguments(parser: argparse.ArgumentParser, output: str, samples: str) -> None:
    parser.add_argument(
        "--bootstrap",
        type=not_negative,
        metavar="N",
        help=f"resamplings of the images for the 95%% intervals, 0 for none ({samples})",
    )
    parser.add_argument("--output", default=output, help=f"the JSON file (default: {output})")
    parser.add_argument("--overwrite", action="store_true", help="replace --output if it exists")


def _add_generating_parsers(subjects: Any) -> None:
    """Adds the protocols that generate images."""
    for name, text in GENERATING_PROTOCOLS.items():
        parser = subjects.add_parser(
            name,
            help=text,
            usage=f"vlv evaluate {name} CONFIG.yaml [--name value ...]",
            description=f"Measures {text}. A run that was ended goes on with the same command; --dry_run prints its "
            "plan and loads no model. docs/evaluation_protocols.md lists the settings; "
            f"evaluation/configs/{name}.yaml has those of the paper.",
        )
        parser.set_defaults(run="evaluate_generated:run_protocol", takes_settings=True, protocol=name)


def _add_endpoint_parsers(subjects: Any) -> None:
    """Adds the commands to those of `vlv evaluate`."""
    for name, text in PROTOCOLS.items():
        parser = subjects.add_parser(
            name,
            help=text.partition(" (")[0],
            usage=f"vlv evaluate {name} CONFIG.yaml [--name value ...]",
            add_help=False,
        )
        parser.set_defaults(run="evaluate_endpoint:run_protocol", takes_settings=True, protocol=name)
    agreement = subjects.add_parser(
        "agreement",
        help="of two judges' scores of the same captions",
        description="Agreement of two judges: Cohen's kappa with squared weights, and the share of equal scores.",
    )
    agreement.add_argument("results", nargs=2, type=Path, metavar="RESULTS", help="results.json of vlv evaluate judge")
    agreement.set_defaults(run="evaluate_endpoint:run_agreement")
