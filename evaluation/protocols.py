"""Protocols that ask a model behind an endpoint: a judge of captions, and questions answered from captions.

Each has a configuration (a YAML file, with options that override it), goes on where an interrupted run stopped, and
writes into its `output_dir` the answers (`answers.jsonl`), the metrics (`results.json`) and a table (`results.md`).
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlv.files import write_json

from .caption_sets import read_captions
from .distances import mean_interval
from .endpoint import Endpoint, EndpointOptions, EndpointSettings, Totals
from .judge import (
    COMPARISON_PROMPT,
    SCORE_PROMPT,
    Judgement,
    compare_captions,
    score_captions,
    weighted_kappa,
)
from .markdown import markdown_table
from .published import JUDGE_SCORE, published_score, require_row
from .results import package_versions
from .vqa import VQAResult, answer_from_captions, plan_pass, read_vqa

# Of the paper (arXiv 2507.07104 v2): Table 3 by benchmark and shots.
PUBLISHED_VQA = {
    "vqav2": {0: 58.55, 4: 61.72, 32: 63.60},
    "ok-vqa": {0: 45.31, 4: 54.10, 32: 60.25},
}
SHARE_LABEL = "share won (ties half)"


@dataclass
class EndpointConfig(EndpointOptions):
    """A model behind an OpenAI-compatible endpoint."""

    output_dir: str = field(
        default="", metadata={"help": "folder of answers and results; a run goes on with the answers in it"}
    )
    endpoint_model: str = field(default="", metadata={"help": "the model's name at the endpoint"})
    base_url: str | None = field(default=None, metadata={"help": "address, such as http://127.0.0.1:8000/v1"})
    max_tokens: int = field(default=512, metadata={"help": "most tokens of an answer"})
    limit: int | None = field(default=None, metadata={"help": "images or questions to take, from the beginning"})
    dry_run: bool = field(
        default=False, metadata={"help": "read everything, print the plan and one prompt, ask nothing"}
    )

    def __post_init__(self):
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}; it must be at least 1")
        self.endpoint()  # checks the prices

    def require(self, *names: str) -> None:
        """Raises `ValueError` for a setting that is not given."""
        for name in names:
            if not getattr(self, name):
                raise ValueError(f"{name} is missing: {self.__dataclass_fields__[name].metadata['help']}")

    def endpoint(self) -> EndpointSettings:
        return EndpointSettings(self.endpoint_model, self.base_url, max_tokens=self.max_tokens, **self.options())


@dataclass
class VQAConfig(EndpointConfig):
    """Accuracy of a language model that reads captions in place of images (the paper's Table 3)."""

    questions: str = field(default="", metadata={"help": "file of questions: VQA v2, OK-VQA, or choices"})
    annotations: str | None = field(default=None, metadata={"help": "file of annotations of VQA v2 or OK-VQA"})
    captions: str | None = field(default=None, metadata={"help": "JSON of vlv caption; without it, blind answers"})
    shots: list[int] = field(default_factory=lambda: [0], metadata={"help": "solved examples before each question"})
    support_questions: str | None = field(default=None, metadata={"help": "questions that examples are drawn from"})
    support_annotations: str | None = field(default=None, metadata={"help": "their annotations"})
    support_captions: str | None = field(default=None, metadata={"help": "captions of their images"})
    blind: bool = field(default=True, metadata={"help": "ask without captions, too, as a baseline"})
    benchmark: str | None = field(
        default=None, metadata={"help": f"for the paper's column: {', '.join(PUBLISHED_VQA)}"}
    )
    seed: int = field(default=0, metadata={"help": "of the examples that are drawn"})

    def __post_init__(self):
        super().__post_init__()
        self.require("output_dir", "endpoint_model", "questions")
        if not self.shots or min(self.shots) < 0:
            raise ValueError(f"shots is {self.shots}; expected one or more numbers, each 0 or above")
        if self.benchmark not in (None, *PUBLISHED_VQA):
            raise ValueError(f"benchmark is {self.benchmark!r}; expected one of {', '.join(PUBLISHED_VQA)}")
        if any(self.shots) and not self.support_questions:
            raise ValueError(f"shots {self.shots} need support_questions, with annotations and captions")


@dataclass
class JudgeConfig(EndpointConfig):
    """A vision model scores captions from 0 to 6, or compares those of two captioners (the paper's Table 2)."""

    images: str = field(default="", metadata={"help": "folder that the names in captions are relative to"})
    captions: str = field(default="", metadata={"help": "JSON of vlv caption"})
    against: str | None = field(default=None, metadata={"help": "captions of another captioner, to compare with"})
    paper: str | None = field(
        default=None,
        metadata={"help": "row of the paper's Table 2 beside the scores, table2/vlv, where captions are a VLV's"},
    )

    def __post_init__(self):
        super().__post_init__()
        require_row(self.paper, "judge")
        self.require("output_dir", "endpoint_model", "images", "captions")
        if not Path(self.images).is_dir():
            raise ValueError(f"images: {self.images} is not a folder")


def run_vqa(config: VQAConfig, advance: Callable[[int], None] = lambda done: None) -> str:
    """Asks the questions with each number of shots. Returns the table, or the plan of a dry run.

    Raises:
        ValueError, OSError: For a file that cannot be read or has another form, and for too few examples, before
            anything is asked.
        EndpointError, PriceReached: As [`Endpoint.ask`]; the answers so far are kept.
    """
    items = read_vqa(Path(config.questions), _optional(config.annotations))[: config.limit]
    captions = None if config.captions is None else read_captions(Path(config.captions))
    support = (
        []
        if config.support_questions is None
        else read_vqa(Path(config.support_questions), _optional(config.support_annotations))
    )
    support_captions = None if config.support_captions is None else read_captions(Path(config.support_captions))
    contexts = [*([captions] if captions is not None else []), *([None] if config.blind or captions is None else [])]
    passes = [
        plan_pass(items, context, shots, support, support_captions, config.seed)
        for shots in config.shots
        for context in contexts
    ]
    if config.dry_run:
        _, prompt = next(passes[0].prompts())
        return f"{sum(len(own.asked) for own in passes)} requests; the first question:\n\n{prompt}"
    run = _Run(config)
    rows, figures = [], {}
    for planned in passes:
        with run.keeping():
            result = answer_from_captions(run.endpoint, planned, advance)
        name = f"{planned.shots} shots, {'blind' if planned.blind else 'captions'}"
        figures[name] = _vqa_figures(result)
        published = None if planned.blind else PUBLISHED_VQA.get(config.benchmark or "", {}).get(planned.shots)
        rows.append([name, *_vqa_row(figures[name]), "" if published is None else f"{published:.2f}"])
    head = [
        "prompt",
        "questions",
        "failed",
        "no caption",
        "accuracy, %",
        "95% interval",
        "exact match, %",
        "VLV, paper",
    ]
    return run.finish(figures, markdown_table(head, rows))


def run_judge(config: JudgeConfig, advance: Callable[[int], None] = lambda done: None) -> str:
    """Scores captions, or compares them. Returns the table, or the plan of a dry run.

    Raises:
        ValueError, OSError: For a file that cannot be read or has another form.
        EndpointError, PriceReached: As [`Endpoint.ask`]; the answers so far are kept.
    """
    captions = read_captions(Path(config.captions))
    captions = dict(list(captions.items())[: config.limit])
    if not captions:
        raise ValueError(f"{config.captions} has no captions")
    missing = [name for name in captions if not (Path(config.images) / name).is_file()]
    if missing:
        raise ValueError(f"{len(missing)} captions have no image in {config.images}, such as {missing[0]!r}")
    against = None if config.against is None else read_captions(Path(config.against))
    if against is not None and not captions.keys() & against.keys():
        raise ValueError(f"{config.captions} and {config.against} have no image in common")
    if config.dry_run:
        prompt = SCORE_PROMPT if against is None else COMPARISON_PROMPT
        count = len(captions) if against is None else 2 * len(captions.keys() & against.keys())
        return f"{count} requests; the prompt:\n\n{prompt}"
    run = _Run(config)

    def read(name: str) -> bytes:
        return (Path(config.images) / name).read_bytes()

    with run.keeping():
        if against is None:
            judgement = score_captions(run.endpoint, captions, read, advance)
        else:
            judgement = compare_captions(run.endpoint, captions, against, read, advance)
    figures = _judge_figures(judgement)
    figures["verdicts"] = {own.name: own.value for own in judgement.verdicts}
    mean = _interval(figures["value"])
    if against is None:
        head, row = ["captions", "failed", JUDGE_SCORE, "95% interval"], mean
        if published := published_score(config.paper):
            head, row = [*head, published[0]], [*mean, published[1]]
    else:
        head = ["images", "failed", SHARE_LABEL, "95% interval", "both orders agree"]
        row = [*mean, f"{figures['orders_agree']:.2f}"]
    return run.finish(figures, markdown_table(head, [[len(judgement.verdicts), len(judgement.failed), *row]]))


class _Run:
    """The endpoint of a run, and what the run writes."""

    def __init__(self, config: EndpointConfig):
        self.config, self.folder = config, Path(config.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.endpoint = Endpoint(config.endpoint(), self.folder / "answers.jsonl")

    def keeping(self) -> "_Summary":
        return _Summary(self.endpoint.totals, self.folder)

    def finish(self, figures: Mapping[str, Any], table: str) -> str:
        totals = asdict(self.endpoint.totals)
        write_json(
            self.folder / "results.json",
            {"metrics": figures, "config": asdict(self.config), "totals": totals, "versions": package_versions()},
        )
        (self.folder / "results.md").write_text(table + "\n", encoding="utf-8")
        return table


@dataclass
class _Summary:
    """Prints what a run has, also when it is interrupted."""

    totals: Totals
    folder: Path

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: Any) -> None:
        own = self.totals
        paid = f", {own.price:.4f} paid" if own.price else ""
        kept = f"{own.kept} kept from {self.folder / 'answers.jsonl'}"
        print(f"{own.answered} answered, {kept}, {own.failed} failed{paid}", file=sys.stderr)
        for problem in own.problems[:5]:
            print(f"failed: {problem}", file=sys.stderr)


def _vqa_figures(result: VQAResult) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "questions": len(result.soft),
        "failed": result.failed,
        "without_caption": result.without_caption,
    }
    for name, values in (("accuracy", result.soft), ("exact_match", result.exact)):
        if values:
            figures[name] = _mean(values)
    return figures


def _vqa_row(figures: Mapping[str, Any]) -> list[str]:
    counts = [str(figures["questions"]), str(len(figures["failed"])), str(figures["without_caption"])]
    if "accuracy" not in figures:
        return [*counts, "", "", ""]
    accuracy = figures["accuracy"]
    interval = f"{100 * accuracy['low']:.2f} to {100 * accuracy['high']:.2f}"
    return [*counts, f"{100 * accuracy['mean']:.2f}", interval, f"{100 * figures['exact_match']['mean']:.2f}"]


def _judge_figures(judgement: Judgement) -> dict[str, Any]:
    """Raises `ValueError` if nothing was judged."""
    values = [own.value for own in judgement.verdicts]
    if not values:
        reasons = list(judgement.failed.values())
        raise ValueError(f"the judge gave no verdict; the first reason: {reasons[0] if reasons else 'no captions'}")
    figures: dict[str, Any] = {"value": _mean(values), "failed": judgement.failed}
    agreements = [own.orders_agree for own in judgement.verdicts if own.orders_agree is not None]
    if agreements:
        figures["orders_agree"] = sum(agreements) / len(agreements)
    return figures


def _mean(values: Sequence[float]) -> dict[str, float]:
    """Mean, and the ends of its 95% bootstrap interval."""
    low, high = mean_interval(values)
    return {"mean": sum(values) / len(values), "low": low, "high": high}


def _interval(value: Mapping[str, float]) -> list[str]:
    return [f"{value['mean']:.2f}", f"{value['low']:.2f} to {value['high']:.2f}"]


def _optional(path: str | None) -> Path | None:
    return None if path is None else Path(path)


def describe_agreement(first: Path, second: Path) -> str:
    """Agreement of the scores of two judges: their `results.json` files. One line.

    Raises:
        ValueError: If a file has no scores, such as one of comparisons (`against`), or no caption is scored in both.
    """
    one, other = _read_scores(first), _read_scores(second)
    names = [name for name in one if name in other]
    if not names:
        raise ValueError(f"{first} and {second} scored no caption in common")
    scores = [[own[name] for name in names] for own in (one, other)]
    kappa = weighted_kappa(*scores)
    equal = sum(a == b for a, b in zip(*scores, strict=True)) / len(names)
    return f"{len(names)} captions: weighted kappa {kappa:.2f}, equal scores {equal:.0%}"


def _read_scores(path: Path) -> dict[str, int]:
    """The scores of a judge by name of the image.

    Raises:
        ValueError: If the file has none; the message names it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        scores = {name: int(value) for name, value in content["metrics"]["verdicts"].items()}
        against = content["config"]["against"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a results.json of vlv evaluate judge: {error!r}") from error
    if against is not None:
        raise ValueError(f"{path} compares captions with {against}; agreement is of results without against")
    return scores
