"""How well one list of scenes agrees with another: exact, so that no judgement enters."""

from collections import Counter
from collections.abc import Callable, Sequence

from .world import Scene, SceneObject

ASPECTS: dict[str, Callable[[SceneObject], tuple]] = {
    "object_f1": lambda o: (o.name,),
    "object_place_f1": lambda o: (o.name, o.place),
    "object_size_place_f1": lambda o: (o.name, o.size, o.place),
}


def score_scenes(found: Sequence[Scene], truth: Sequence[Scene]) -> dict[str, float]:
    """Agreement of scenes that were read (from captions or pictures) with the true ones.

    Returns:
        `background` accuracy; micro-averaged F1 of objects, of objects with their place, and of objects with size and
        place, counting a concept as often as it occurs; and `exact`, the share of scenes that agree in everything.

    Raises:
        ValueError: If the lists differ in length or are empty.
    """
    if len(found) != len(truth) or not truth:
        raise ValueError(f"expected as many scenes as truths, and at least one; got {len(found)} and {len(truth)}")
    scores = {"background": sum(f.background == t.background for f, t in zip(found, truth, strict=True)) / len(truth)}
    for name, aspect in ASPECTS.items():
        shared = claimed = true = 0
        for f, t in zip(found, truth, strict=True):
            said, there = Counter(map(aspect, f.objects)), Counter(map(aspect, t.objects))
            shared += (said & there).total()
            claimed += said.total()
            true += there.total()
        scores[name] = 2 * shared / (claimed + true) if claimed + true else 0.0
    scores["exact"] = sum(f == t for f, t in zip(found, truth, strict=True)) / len(truth)
    return {name: round(value, 4) for name, value in scores.items()}
