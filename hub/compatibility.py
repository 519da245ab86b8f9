"""Whether a VLV and a text-to-image model belong together: the family, the widths, and the text encoders' weights."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vlv.diffusion_decoder import family_of_components
from vlv.files import is_variant
from vlv.modeling_vlv import TEXT_ENCODERS, VLVModel

from .layout import ENCODER_FOLDER, MODEL_INDEX_FILE, TEXT_ENCODER_FILES
from .load import diffusion_model_folder

COMPARED_FILES = [*TEXT_ENCODER_FILES, f"{ENCODER_FOLDER}/*.safetensors"]
"""Of a text-to-image model, what `check_text_encoders` reads."""
ROWS = 4  # of each weight are compared
PREFIXES = ("text_model.", "model.")  # which some versions of transformers write before a weight's name


def check_compatible(
    encoder: VLVModel,
    components: Mapping[str, Any],
    model: str,
    source: str | os.PathLike,
    *,
    token: str | None = None,
) -> None:
    """Raises if a VLV was not trained with this text-to-image model, as far as their parts tell.

    Args:
        components: Of the text-to-image model, as `load_diffusion_components` returns them.
        model: Name of the VLV, for messages.
        source: Folder or repo id of the text-to-image model. Text encoders in it are compared with the VLV's.
        token: Of the Hub.

    Raises:
        ValueError: If the two are of different families, or have text encoders of other widths or weights,
            or `source` lacks a tokenizer of theirs.
    """
    family = family_of_components(components, source)
    family.check_components(components, encoder.config, model, os.fspath(source))
    folder = diffusion_model_folder(source, [MODEL_INDEX_FILE, *COMPARED_FILES], token=token)
    check_text_encoders(encoder, folder, model, os.fspath(source))


def check_text_encoders(encoder: VLVModel, folder: Path, model: str, source: str) -> None:
    """Raises if a text encoder of a VLV has other weights than that of a text-to-image model.

    A part of each weight is compared, to the precision in which they are stored. A text encoder that the folder does
    not have in safetensors files is passed over.

    Args:
        folder: Of the text-to-image model; one in the layout of this project has its text encoders in `encoder`.
        model, source: Names of the VLV and of the text-to-image model, for the message.

    Raises:
        ValueError: If they differ, or a file is damaged.
    """
    for name, own in zip(TEXT_ENCODERS, encoder.text_encoders, strict=False):
        stored = _stored_rows(folder / name) or _stored_rows(folder / ENCODER_FOLDER, f"{name}.")
        weights = {_plain(key): tensor for key, tensor in own.state_dict().items()}
        for key in weights.keys() & stored.keys() if stored else ():
            if not _same(weights[key][:ROWS], stored[key]):
                raise ValueError(
                    f"{model} and {source} do not fit together: {name} of {source} has other weights than that of "
                    f"{model}, such as {key}; the denoiser reads only what its own text encoder makes. Give the "
                    f"text-to-image model that {model} was trained with, or train a new VLV with {source} from stage 1"
                )


def text_encoders_fingerprint(encoder: VLVModel) -> str:
    """A hash of the first rows of each weight of the text encoders, which tells them apart."""
    digest = hashlib.sha256()
    for own in encoder.text_encoders:
        for key, weight in own.state_dict().items():
            digest.update(key.encode())
            digest.update(weight[:ROWS].float().cpu().numpy() if weight.ndim else b"")
    return digest.hexdigest()


def _stored_rows(folder: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """The first rows of each weight in the safetensors files of a folder; empty without such files.

    Args:
        prefix: Of the names of the weights that count.
    """
    rows = {}
    for path in sorted(folder.glob("*.safetensors")):
        if is_variant(path.name):
            continue
        try:
            with safe_open(path, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (not a mapping)
                    name, part = key.removeprefix("model."), tensors.get_slice(key)
                    if name.startswith(prefix) and part.get_shape():
                        rows[_plain(name.removeprefix(prefix))] = part[:ROWS]
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged, or not a safetensors file: {error}") from error
    return rows


def _plain(key: str) -> str:
    for prefix in PREFIXES:
        key = key.removeprefix(prefix)
    return key


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two weights are equal up to the rounding of the precision in which one of them was stored."""
    if one.shape != other.shape:
        return False
    one, other = one.detach().cpu().float(), other.float()
    precision = max(_precision(one), _precision(other))
    smallest = 1e-7 if precision > torch.finfo(torch.float32).eps else 0.0  # float16 has no smaller numbers
    return torch.allclose(one, other, rtol=precision, atol=smallest)


def _precision(tensor: torch.Tensor) -> float:
    """The relative distance of neighbouring numbers of the coarsest precision that holds all values of a tensor."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(tensor.to(dtype).float(), tensor):
            return torch.finfo(dtype).eps
    return torch.finfo(torch.float32).eps
