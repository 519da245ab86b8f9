"""Denoiser and autoencoder out of a diffusers folder or repository, whole or not at all."""

import os
from pathlib import Path
from typing import Any

from diffusers import ModelMixin

from ..files import read_json, refuse_damaged


def load_part(part: type[ModelMixin], model: str | os.PathLike, subfolder: str, **kwargs: Any) -> Any:
    """As diffusers' `from_pretrained`, but of safetensors alone, and every weight must be there.

    Args:
        part: Such as `UNet2DConditionModel`.
        model: A folder or repo id.
        kwargs: Of `from_pretrained`.

    Raises:
        OSError: If it cannot be had, or holds pickled weights alone.
        ValueError: If a file is damaged, or a weight is missing or of another shape.
    """
    place, local = f"{model}, {subfolder}", Path(model) / subfolder
    if Path(model).is_dir():
        place = str(local)
        read_json(local / "config.json", "_class_name")
    try:
        loaded, report = part.from_pretrained(
            model, subfolder=subfolder, use_safetensors=True, output_loading_info=True, **kwargs
        )
    except OSError as error:
        raise OSError(f"{place} cannot be loaded: {error}{_remedy(local)}") from error
    except (ValueError, RuntimeError) as error:
        refuse_damaged(local)
        raise ValueError(f"{place}: the weights do not fit its config.json: {error}") from error
    if report["missing_keys"]:
        lacking = sorted(report["missing_keys"])
        raise ValueError(f"{place} lacks {len(lacking)} weights, such as {lacking[0]}; is it whole?")
    return loaded


def _remedy(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if not pickles or any(folder.glob("*.safetensors")):
        return ""
    return (
        f"\nIt holds {pickles[0]}, a pickle, which can run code when it is opened. If you trust it, convert it once: "
        "DiffusionPipeline.from_pretrained(FOLDER, use_safetensors=False).save_pretrained(NEW_FOLDER)"
    )
