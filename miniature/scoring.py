"""Scores of predicted scenes against the true ones, by exact comparison."""

from collections import Counter
from collections.abc import Callable, Sequence

from .world import Scene, SceneObject

ASPECTS: dict[str, Callable[[SceneObject], tuple]] = {
    "object_f1": lambda o: (o.name,),
    "object_place_f1": lambda o: (o.name, o.place),
    "object_size_place_f1": lambda o: (o.name, o.size, o.place),
}


def score_scenes(predicted: Sequence[Scene], true: Sequence[Scene]) -> dict[str, float]:
    """Agreement of scenes that were predicted (from captions or images) with the true ones.

    Args:
        predicted: One scene for each of `true`.

    Returns:
        All in 0..1: `background` accuracy; micro-averaged F1 of objects, of objects with their place, and of objects
        with size and place, where an object counts as often as it occurs; and `exact`, the share of scenes that are
        equal.

    Raises:
        ValueError: If the lists differ in length or are empty.
    """
    if len(predicted) != len(true) or not true:
        raise ValueError(
            f"expected one predicted scene for each true scene, and at least one; got {len(predicted)} and {len(true)}"
        )
    counts = [count_agreement(p, t) for p, t in zip(predicted, true, strict=True)]
    scores = {}
    for name in counts[0]:
        agreeing, total = (sum(own[name][part] for own in counts) for part in (0, 1))
        scores[name] = round(agreeing / total, 4) if total else 0.0
    return scores


def count_agreement(predicted: Scene, true: Scene) -> dict[str, tuple[int, int]]:
    """Of one scene, the two counts of each score of `score_scenes`: what agrees, and of how much.

    An F1 is the sum of the first counts over the sum of the second ones: twice the matches, and the objects of both.
    """
    found = {"background": (int(predicted.background == true.background), 1)}
    for name, aspect in ASPECTS.items():
        predicted_counts, true_counts = Counter(map(aspect, predicted.objects)), Counter(map(aspect, true.objects))
        matches = (predicted_counts & true_counts).total()
        found[name] = 2 * matches, predicted_counts.total() + true_counts.total()
    found["exact"] = int(predicted == true), 1
    return found
