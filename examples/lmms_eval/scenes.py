"""Functions of the task in this folder, for lmms-eval."""

from PIL import Image

from vlv.miniature.grammar import parse_caption
from vlv.miniature.scoring import score_scenes


def doc_to_visual(doc: dict) -> list[Image.Image]:
    return [Image.open(doc["image"]).convert("RGB")]


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """The scores of one caption. The aggregation is the mean over the images."""
    scores = score_scenes([parse_caption(results[0])], [parse_caption(doc["caption"])])
    return {name: scores[name] for name in ("object_f1", "exact")}
