"""Figures that the paper (arXiv 2507.07104 v2) publishes, by the name of their row, and notes on what is not alike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

GUIDANCE = (1.0, 2.0, 3.0, 4.0)
COCO = 30_000
"""Images of MS-COCO 2014 val in Tables 1 and 5 (left). The other tables do not state how many they have."""
JUDGE_SCORE = "score, 0 to 6"


@dataclass(frozen=True)
class Row:
    """A row or column of a table of the paper.

    Attributes:
        protocol: The command of `vlv evaluate` that measures it.
        title: What it is, in words.
        figures: Values by guidance scale, by the label of the figure. A scale of None is not published, or the
            protocol has none.
        num_images: None if it is not published.
    """

    protocol: str
    title: str
    figures: Mapping[str, Mapping[float | None, float]]
    num_images: int | None = None


def _fid(protocol: str, title: str, values: Sequence[float], num_images: int | None = None) -> Row:
    return Row(protocol, title, {"FID": dict(zip(GUIDANCE, values, strict=True))}, num_images)


def _spatial(images: int, angle: float, centre: float, scale: float) -> Row:
    values = {"angle (L1)": angle, "centre (L1)": centre, "scale (L1)": scale}
    title = f"VLV after {images} million images (Table 6)"
    return Row("spatial", title, {label: {None: value} for label, value in values.items()})


ROWS = {
    "table2/vlv": Row("judge", "VLV (Table 2, mean of two judges)", {JUDGE_SCORE: {None: 5.18}}),
    "table1/original": _fid("cycle", "COCO's captions (Table 1)", (16.62, 9.90, 12.69, 14.49), COCO),
    "table1/recap-7b": _fid("cycle", "Recap-7B (Table 1)", (12.26, 7.70, 10.16, 11.82), COCO),
    "table1/llava-v1.5-7b": _fid("cycle", "LLaVA-v1.5-7B (Table 1)", (14.54, 9.99, 12.93, 14.91), COCO),
    "table1/qwen2.5-vl-7b": _fid("cycle", "Qwen2.5-VL-7B (Table 1)", (12.61, 6.98, 9.19, 10.59), COCO),
    "table1/florence-2-large": _fid("cycle", "Florence-2 Large (Table 1)", (10.61, 7.51, 9.95, 11.35), COCO),
    "table1/vlv": _fid("cycle", "VLV (Table 1)", (11.47, 6.64, 8.56, 9.90), COCO),
    "table1/gemini-2.0-flash": _fid("cycle", "Gemini 2.0 Flash (Table 1)", (12.82, 5.87, 7.57, 8.77), COCO),
    "table1/gpt-4o": _fid("cycle", "GPT-4o (Table 1)", (12.16, 6.20, 7.96, 9.25), COCO),
    "table4/16": Row("reconstruction", "VLV with 16 queries (Table 4)", {"FID": {None: 5.72}}),
    "table4/32": Row("reconstruction", "VLV with 32 queries (Table 4)", {"FID": {None: 5.60}}),
    "table4/77": Row("reconstruction", "VLV with 77 queries (Table 4)", {"FID": {None: 5.30}}),
    "table4/mlp": _fid("cycle", "MLP trained alone (Table 4)", (14.27, 9.71, 11.87, 13.22)),
    "table4/mlp-llm": _fid("cycle", "MLP and LLM trained (Table 4)", (12.22, 7.55, 9.58, 10.84)),
    "table4/mlp-llm-encoder": _fid("cycle", "MLP, LLM and encoder trained (Table 4)", (11.47, 6.64, 8.56, 9.90)),
    "table5/6m": _fid("reconstruction", "VLV after 6 million images (Table 5)", (11.38, 9.01, 10.33, 10.81), COCO),
    "table5/18m": _fid("reconstruction", "VLV after 18 million images (Table 5)", (10.14, 7.57, 8.41, 8.78), COCO),
    "table5/40m": _fid("reconstruction", "VLV after 40 million images (Table 5)", (9.71, 7.22, 7.70, 7.84), COCO),
    "table5/0.5b": _fid("cycle", "decoder of 0.5B (Table 5)", (14.70, 9.37, 11.26, 12.45)),
    "table5/1.5b": _fid("cycle", "decoder of 1.5B (Table 5)", (12.25, 7.30, 9.16, 10.26)),
    "table5/3b": _fid("cycle", "decoder of 3B (Table 5)", (11.47, 6.64, 8.56, 9.90)),
    "table6/8m": _spatial(8, 0.1564, 0.1625, 0.1775),
    "table6/18m": _spatial(18, 0.1287, 0.1498, 0.1773),
    "table6/34m": _spatial(34, 0.1227, 0.1402, 0.1835),
    "table6/40m": _spatial(40, 0.1016, 0.0988, 0.1222),
    "table7/0.5b": _fid("cycle", "0.5B without stage 1 (Table 7)", (57.29, 64.02, 66.92, 68.18)),
    "table7/1.5b": _fid("cycle", "1.5B without stage 1 (Table 7)", (49.15, 56.66, 59.15, 60.14)),
    "table7/3b": _fid("cycle", "3B without stage 1 (Table 7)", (45.63, 51.03, 53.28, 54.40)),
    "table7/3b-stage-1": _fid("cycle", "3B with stage 1 (Table 7)", (12.22, 7.55, 9.58, 10.84)),
}


def require_row(name: str | None, protocol: str) -> None:
    """Raises `ValueError` if a name is not that of a row of a protocol. An empty one names none."""
    known = [own for own, row in ROWS.items() if row.protocol == protocol]
    if name and name not in known:
        raise ValueError(f"paper is one of {', '.join(known)}, not {name!r}")


def published_figures(name: str | None, label: str, scales: Sequence[str]) -> tuple[str, list[str]] | None:
    """The label of the row and its cells for each guidance scale; None if the paper has no such figure.

    A figure whose scale is not published stands under the first one, and the label says so.
    """
    row = None if name is None else ROWS.get(name)
    if row is None or label not in row.figures:
        return None
    values = row.figures[label]
    if None in values:
        cells = [str(values[None]), *("" for _ in scales[1:])]
        return f"{label} of the paper's {row.title}, guidance not stated", cells
    return f"{label} of the paper's {row.title}", [str(values.get(float(scale), "")) for scale in scales]


def published_score(name: str | None) -> tuple[str, str] | None:
    """The label and the score of a row of the judge; None if `name` names no such row."""
    row = None if name is None else ROWS.get(name)
    if row is None or JUDGE_SCORE not in row.figures:
        return None
    return f"{JUDGE_SCORE} of the paper's {row.title}", str(row.figures[JUDGE_SCORE][None])


def published_notes(config: Mapping[str, Any], num_images: int, labels: Sequence[str]) -> list[str]:
    """What is not alike in the figures of a run and the row of the paper that stands beside them.

    Args:
        config: Of the run. `paper` is the row, `resize` that of Inception's images.
        num_images: Of the run.
        labels: Of its figures.
    """
    row = ROWS.get(config.get("paper") or "")
    if row is None:
        return []
    name, notes = config["paper"], []
    if missing := [label for label in row.figures if label not in labels]:
        return [f"the run has no figure {' and no '.join(missing)}, which the paper's {name} has"]
    if row.num_images is not None and row.num_images != num_images:
        notes.append(f"the paper's {name} is of {row.num_images} images, this run of {num_images}; FID depends on it")
    if "FID" in row.figures and config.get("resize") != "pytorch-fid":
        notes.append(f"the paper's {name} is of images resized as pytorch-fid, this run's as {config.get('resize')}")
    return notes
