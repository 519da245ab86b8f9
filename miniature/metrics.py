"""What `vlv evaluate miniature` prints: every figure, and those that were to be reached."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from vlv.evaluation import markdown_table

COLUMNS = ("background", "object_f1", "object_place_f1", "object_size_place_f1", "exact")
HEADERS = ("background", "object F1", "object + place F1", "object + size + place F1", "exact scene")


@dataclass(frozen=True)
class Goal:
    """A figure with the least that will do and what was hoped for.

    Attributes:
        parts: Names of measurements, of which the best counts.
        column: One of `COLUMNS`.
    """

    label: str
    parts: tuple[str, ...]
    column: str
    floor: float
    aim: float

    def reached(self, figures: Mapping[str, Mapping[str, Any]]) -> float | None:
        """The best of the parts that were measured."""
        return max((figures[part][self.column] for part in self.parts if part in figures), default=None)


TEACHER = tuple(f"teacher's pictures of prompts, combo, guidance {guidance}" for guidance in (1, 2, 4))
RECONSTRUCTIONS = tuple(f"reconstructions, combo, guidance {guidance}" for guidance in (1, 2))
GOALS = (
    Goal(
        "scene classifier itself, object + place F1",
        ("judge on clean pictures, combo",),
        "object_place_f1",
        0.98,
        0.995,
    ),
    Goal("teacher's pictures of prompts, object + place F1", TEACHER, "object_place_f1", 0.85, 0.95),
    Goal("stage 1's reconstructions, object + place F1", RECONSTRUCTIONS, "object_place_f1", 0.85, 0.95),
    Goal("stage 1's reconstructions, background", RECONSTRUCTIONS, "background", 0.97, 0.99),
    Goal("captions, object F1", ("captions, combo",), "object_f1", 0.93, 0.98),
    Goal("captions, object + place F1", ("captions, combo",), "object_place_f1", 0.88, 0.96),
    Goal("captions, background", ("captions, combo",), "background", 0.97, 0.99),
    Goal("captions, exact scene", ("captions, combo",), "exact", 0.65, 0.90),
)


def figures_table(figures: Mapping[str, Any]) -> str:
    """All parts' scores, as Markdown."""
    rows: dict[tuple[str, str], list[tuple[str, ...]]] = {}  # both splits of a part together
    for name, scores in figures.items():
        if isinstance(scores, Mapping) and "exact" in scores:
            subject, _, rest = name.partition(", ")
            split, _, setting = rest.partition(", ")
            notes = [setting] if setting else []
            if "psnr" in scores:
                notes.append(f"{scores['psnr']} dB")
            label = f"{subject} ({', '.join(notes)})" if notes else subject
            rows.setdefault((subject, setting), []).append(
                (label, split, *(f"{scores[column]:.3f}" for column in COLUMNS))
            )
    return markdown_table(("on unseen scenes", "split", *HEADERS), list(chain.from_iterable(rows.values())))


def goals_table(figures: Mapping[str, Any]) -> str:
    """What was to be reached on `combo`, and whether it was, as Markdown."""
    rows = []
    for goal in GOALS:
        value = goal.reached(figures)
        if value is not None:
            verdict = "aim reached" if value >= goal.aim else "floor reached" if value >= goal.floor else "missed"
            rows.append((goal.label, f"{value:.3f}", f"{goal.floor}", f"{goal.aim}", verdict))
    return markdown_table(("on combo, at the best guidance", "figure", "floor", "aim", ""), rows)
