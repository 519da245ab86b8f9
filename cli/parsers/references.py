"""The options of what captions are measured against."""

import argparse

from .common import positive


def add_reference_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what captions are measured against."""
    parser.add_argument(
        "--references", metavar="FILE", help="JSON: {image: [caption, ...]}, or COCO's caption annotations"
    )
    parser.add_argument("--clip", metavar="MODEL", help="folder or Hub repo id of a CLIP model, for CLIPScore")
    parser.add_argument("--bert", metavar="MODEL", help="folder or Hub repo id of a text encoder, for BERTScore")
    parser.add_argument(
        "--bert-layer", type=positive, metavar="N", help="the layer of --bert to compare (default: the last)"
    )
    parser.add_argument(
        "--vocabulary", metavar="FILE", help="JSON: {object: [synonym, ...]}, the objects that CHAIR looks for"
    )
    parser.add_argument(
        "--objects",
        metavar="FILE",
        help="JSON: {image: [object, ...]}, what the images show, for CHAIR (default: what the references mention)",
    )
