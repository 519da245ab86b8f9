"""Loads the components of a diffusers folder or repository, completely or with an error that names the fault."""

import os
from pathlib import Path
from typing import Any

import diffusers
import torch

from ..files import read_json, refuse_damaged, stored_dtype
from ..tokenizer import load_tokenizer


def load_part(part: Any, model: str | os.PathLike, subfolder: str, **kwargs: Any) -> Any:
    """`from_pretrained` of diffusers or transformers, but it reads safetensors alone; a missing weight is an error.

    Args:
        part: The component's class, such as `UNet2DConditionModel` or `CLIPTextModelWithProjection`.
        model: Folder or repo id of the text-to-image model.
        subfolder: The component's folder in it.
        kwargs: Arguments of `from_pretrained`.

    Raises:
        OSError: If the component could not be loaded, or has pickled weights alone.
        ValueError: If the component is of another class, a file is damaged, or a weight is missing or of another
            shape.
    """
    place, local = f"{model}, {subfolder}", Path(model) / subfolder
    if Path(model).is_dir():
        place = str(local)
        config = read_json(local / "config.json")
        name = config.get("_class_name") or next(iter(config.get("architectures") or []), "component without a class")
        if name != part.__name__:
            raise ValueError(f"{place} is a {name}; expected {part.__name__}")
    try:
        loaded, report = part.from_pretrained(
            model, subfolder=subfolder, use_safetensors=True, output_loading_info=True, **kwargs
        )
    except OSError as error:
        raise OSError(f"{place} could not be loaded: {error}{_remedy(local)}") from error
    except (ValueError, RuntimeError) as error:
        refuse_damaged(local)
        raise ValueError(f"{place}: the weights do not fit its config.json: {error}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(f"{place} lacks {len(missing)} weights, such as {missing[0]}; is it complete?")
    return loaded


def _remedy(folder: Path) -> str:
    """How to convert pickled weights, if the folder has no others."""
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if not pickles or any(folder.glob("*.safetensors")):
        return ""
    return (
        f"\nIt holds {pickles[0]}, a pickle, which can run code when it is loaded. If you trust it, convert it once: "
        "DiffusionPipeline.from_pretrained(FOLDER, use_safetensors=False).save_pretrained(NEW_FOLDER)"
    )


def load_components(folder: Path, family: Any, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The components that reconstruct images, of a folder with a `model_index.json`: models, scheduler, tokenizers.

    Args:
        family: Subclass of `DiffusionDecoder`.
        dtype: Precision of denoiser and autoencoder; by default the stored one.

    Returns:
        The components by the names in `family.component_names()`, without the tokenizers of text encoders that the
        family works without and the folder does not have; and `family.pipeline_settings`.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, scheduler or autoencoder are not diffusers', or a tokenizer cannot pad.
    """
    index = read_json(folder / "model_index.json", "scheduler", *family.models)
    name = str(index["scheduler"][1])
    scheduler = getattr(diffusers, name, None)
    if not (isinstance(scheduler, type) and issubclass(scheduler, diffusers.SchedulerMixin)):
        raise ValueError(
            f"{folder / 'model_index.json'} names the scheduler {name!r}; expected a scheduler of diffusers"
        )
    read_json(folder / "scheduler" / "scheduler_config.json", family.scheduler_field)
    components: dict[str, Any] = {"scheduler": getattr(diffusers, name).from_pretrained(folder, subfolder="scheduler")}
    vae_class = getattr(diffusers, str(index["vae"][1]), None)
    if not (
        isinstance(vae_class, type) and issubclass(vae_class, diffusers.ModelMixin) and hasattr(vae_class, "decode")
    ):
        raise ValueError(
            f"{folder / 'model_index.json'} names the autoencoder {index['vae'][1]!r}; expected one of diffusers"
        )
    for part, part_class in {**family.model_classes(), "vae": vae_class}.items():
        stored = dtype or stored_dtype(folder / part)
        components[part] = load_part(part_class, folder, part, torch_dtype=stored)
    for number, name in enumerate(family.tokenizers):
        if number >= len(family.text_encoders) and not (folder / name).is_dir():
            continue
        read_json(folder / name / "tokenizer_config.json")  # otherwise transformers may read the path as a repo id
        components[name] = load_tokenizer(folder / name)
        if components[name].pad_token is None:
            raise ValueError(f"{folder / name} has no padding token; is its tokenizer_config.json complete?")
    return components | {name: index.get(name, default) for name, default in family.pipeline_settings.items()}
