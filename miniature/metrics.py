"""The tables that `vlv evaluate miniature` prints: all scores, the goals of some of them, and obedience."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from vlv.evaluation import markdown_table

METRICS = {  # of `scoring.score_scenes`, with their titles
    "background": "background",
    "object_f1": "object F1",
    "object_place_f1": "object + place F1",
    "object_size_place_f1": "object + size + place F1",
    "exact": "exact scene",
}

DISTANCES = {"frechet_distance": "Fréchet distance", "cosine": "cosine of features"}  # of kept images


@dataclass(frozen=True)
class Goal:
    """The least value of a metric that is acceptable, and the value that was aimed for.

    Attributes:
        measurements: Names of measurements. The best of them counts.
        metric: One of `METRICS`.
        floor: The least acceptable value.
        aim: The value aimed for.
    """

    label: str
    measurements: tuple[str, ...]
    metric: str
    floor: float
    aim: float

    def best_value(self, scores: Mapping[str, Mapping[str, Any]]) -> float | None:
        """The best value of the metric in the measurements that were made; None if there is none.

        Args:
            scores: The scores of each measurement, by its name.
        """
        return max((scores[name][self.metric] for name in self.measurements if name in scores), default=None)

    def result(self, value: float) -> str:
        """Whether a value reaches the aim, the floor, or neither."""
        if value >= self.aim:
            return "aim reached"
        return "floor reached" if value >= self.floor else "missed"


CLASSIFIER = ("scene classifier on clean images, combo",)
TEACHER = tuple(f"teacher's images of prompts, combo, guidance {guidance}" for guidance in (1, 2, 4))
RECONSTRUCTIONS = tuple(f"reconstructions, combo, guidance {guidance}" for guidance in (1, 2))
CAPTIONS = ("captions, combo",)
GOALS = (
    Goal("scene classifier on clean images, object + place F1", CLASSIFIER, "object_place_f1", 0.98, 0.995),
    Goal("teacher's images of prompts, object + place F1", TEACHER, "object_place_f1", 0.85, 0.95),
    Goal("reconstructions, object + place F1", RECONSTRUCTIONS, "object_place_f1", 0.85, 0.95),
    Goal("reconstructions, background", RECONSTRUCTIONS, "background", 0.97, 0.99),
    Goal("captions, object F1", CAPTIONS, "object_f1", 0.93, 0.98),
    Goal("captions, object + place F1", CAPTIONS, "object_place_f1", 0.88, 0.96),
    Goal("captions, background", CAPTIONS, "background", 0.97, 0.99),
    Goal("captions, exact scene", CAPTIONS, "exact", 0.65, 0.90),
)


def scores_table(scores: Mapping[str, Any]) -> str:
    """The scores of all measurements as a Markdown table.

    Args:
        scores: By the name of the measurement: `"subject, split"` or `"subject, split, setting"`. Values that are not
            scores of `score_scenes` (the settings) are skipped. Rows of one subject and setting are placed together.
    """
    rows: dict[tuple[str, str], list[tuple[str, ...]]] = {}
    for name, values in scores.items():
        if isinstance(values, Mapping) and "exact" in values:
            subject, _, rest = name.partition(", ")
            split, _, setting = rest.partition(", ")
            notes = [setting] if setting else []
            if "psnr" in values:
                notes.append(f"{values['psnr']} dB")
            label = f"{subject} ({', '.join(notes)})" if notes else subject
            rows.setdefault((subject, setting), []).append(
                (label, split, *(f"{values[metric]:.3f}" for metric in METRICS))
            )
    return markdown_table(("on unseen scenes", "split", *METRICS.values()), list(chain.from_iterable(rows.values())))


def distances_table(scores: Mapping[str, Any]) -> str:
    """The distances of kept images from their originals, and the scores of the kept captions; empty without images.

    Values have the digits of the tables of the other commands.

    Args:
        scores: As in `scores_table`.
    """
    titles = DISTANCES | METRICS
    if not any(isinstance(values, Mapping) and values.keys() >= DISTANCES.keys() for values in scores.values()):
        return ""
    rows = [
        (*name.partition(", ")[::2], *(f"{values[key]:.4g}" if key in values else "" for key in titles))
        for name, values in scores.items()
        if isinstance(values, Mapping) and (values.keys() >= DISTANCES.keys() or name.startswith("captions, "))
    ]
    return markdown_table(("kept in --images-dir", "split", *titles.values()), rows)


def goals_table(scores: Mapping[str, Any]) -> str:
    """The goals on `combo`, their values and whether they were reached, as a Markdown table."""
    rows = []
    for goal in GOALS:
        value = goal.best_value(scores)
        if value is not None:
            rows.append((goal.label, f"{value:.3f}", f"{goal.floor}", f"{goal.aim}", goal.result(value)))
    return markdown_table(("on combo, at the best guidance", "value", "floor", "aim", "result"), rows)


OBEDIENCE = {"form": "form", "content_f1": "content F1", "words": "words"}  # of `instructions.score_obedience`


def instructions_table(scores: Mapping[str, Any]) -> str:
    """How well captions follow instructions, as a Markdown table; empty without such scores.

    Args:
        scores: As in `scores_table`. Values that are not scores of `score_obedience` are skipped.
    """
    measured = {name: values for name, values in scores.items() if isinstance(values, Mapping) and "form" in values}
    subjects = dict.fromkeys(name.rpartition(", ")[0] for name in measured)
    rows = [
        (*name.rpartition(", ")[::2], f"{values['form']:.3f}", f"{values['content_f1']:.3f}", f"{values['words']:.1f}")
        for subject in subjects
        for name, values in measured.items()
        if name.rpartition(", ")[0] == subject
    ]
    return markdown_table(("instruction", "split", *OBEDIENCE.values()), rows) if rows else ""
