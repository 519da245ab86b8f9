"""Loads causal language models, also from GGUF files."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils.import_utils import is_gguf_available

GGUF_MAGIC = b"GGUF"


def find_gguf(source: str | os.PathLike, gguf_file: str | None = None) -> dict[str, str] | None:
    """Where a GGUF file is, as arguments of transformers' `from_pretrained`; None if `source` is no GGUF file.

    Args:
        source: A GGUF file, or with `gguf_file` a folder or repo id.
        gguf_file: Name of the file in `source`.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If the library `gguf` is not installed.
        ValueError: If the file is not a GGUF file.
    """
    path = Path(source)
    if gguf_file is None:
        if path.suffix.lower() != ".gguf":
            return None
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no file {path}; for a file in a Hub repository pass its repo id as language_model and its "
                "name as gguf_file"
            )
        folder, name = str(path.parent), path.name
    elif path.is_file():
        raise ValueError(f"{path} is a file, so gguf_file is not needed; leave {gguf_file!r} out")
    elif path.is_dir() and not (path / gguf_file).is_file():
        raise FileNotFoundError(f"there is no file {gguf_file} in {path}")
    else:
        folder, name = os.fspath(source), gguf_file
    local = Path(folder) / name
    if local.is_file():
        with open(local, "rb") as file:
            if file.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
                raise ValueError(f"{local} is not a GGUF file: it does not start with the bytes GGUF")
    if not is_gguf_available():
        raise ImportError(f"{name} is a GGUF file, which needs the extra vlv[gguf] (pip install gguf)")
    return {"pretrained_model_name_or_path": folder, "gguf_file": name}


def _refuse_missing(report: dict[str, Any], name: str) -> None:
    """Raises `ValueError` for weights that a load left at random."""
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if missing:
        raise ValueError(
            f"{len(missing)} weights of {name} are missing or of another shape, such as {missing[0]}; is it a "
            "complete causal language model?"
        )


@contextmanager
def _gguf_errors(name: str) -> Iterator[None]:
    """Turns what the readers of GGUF files raise for a damaged or unknown file into `ValueError`."""
    try:
        yield
    except (OSError, ImportError):
        raise  # their messages name what is missing
    except Exception as error:  # numpy, struct and the library gguf raise many kinds for a damaged file
        if "not supported" in str(error):
            raise ValueError(
                f"{name} holds a model that transformers does not read from GGUF ({error}); use its safetensors"
            ) from error
        raise ValueError(f"{name} could not be read; is the file complete? {error!r}") from error


def load_language_model(
    source: str | os.PathLike, gguf_file: str | None = None, *, dtype: torch.dtype | str = "auto", **kwargs: Any
) -> Any:
    """A causal language model. The weights of a GGUF file are dequantised, and the model is a plain one.

    Args:
        source: A GGUF file, a folder or a repo id.
        gguf_file: Name of a GGUF file in the folder or repository.
        dtype: Precision; by default the stored one, of a GGUF file float32.
        kwargs: Further arguments of `AutoModelForCausalLM.from_pretrained`.

    Raises:
        FileNotFoundError: If there is no such GGUF file.
        ImportError: If the library `gguf` is not installed.
        ValueError: If `source` is not a causal language model of transformers, a weight is missing, or a GGUF file is
            damaged or of an architecture that transformers does not read.
    """
    gguf = find_gguf(source, gguf_file)
    if gguf is None:
        kwargs = {"trust_remote_code": False, "output_loading_info": True, **kwargs}
        loaded, report = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **kwargs)
        _refuse_missing(report, os.fspath(source))
        return loaded
    name = str(Path(gguf["pretrained_model_name_or_path"], gguf["gguf_file"]))
    with _gguf_errors(name):
        model, report = AutoModelForCausalLM.from_pretrained(
            **gguf,
            dtype=torch.float32 if dtype == "auto" else dtype,
            quantization_config=GgufConfig(dequantize=True),  # without it the model could not be trained or saved
            output_loading_info=True,
        )
    _refuse_missing(report, name)
    model.config.name_or_path = name
    return model


def load_gguf_tokenizer(gguf: dict[str, str]) -> Any:
    """The tokenizer in a GGUF file; the argument is what `find_gguf` returns."""
    with _gguf_errors(str(Path(gguf["pretrained_model_name_or_path"], gguf["gguf_file"]))):
        return AutoTokenizer.from_pretrained(**gguf, trust_remote_code=False)
