"""Loads tokenizers as they were saved."""

import os
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from .files import read_json
from .language_model import find_gguf, load_gguf_tokenizer


def load_tokenizer(source: str | os.PathLike, gguf_file: str | None = None, **kwargs: Any) -> Any:
    """A tokenizer as it was saved. No code of the repository runs.

    transformers 5 loads any tokenizer beside a Qwen2 model (and some others) as Qwen2's own class, whatever its
    configuration says. Another tokenizer's text then becomes wrong ids without a warning. A tokenizer that was saved
    as a generic one is therefore loaded as `PreTrainedTokenizerFast`.

    Args:
        source: Folder, repo id or GGUF file.
        gguf_file: Name of a GGUF file in the folder or repository, whose tokenizer is loaded.
        kwargs: Arguments of `from_pretrained`, such as `subfolder` and `revision`.

    Raises:
        OSError: If there is no tokenizer at `source`.
        ValueError: If one of its files is damaged.
    """
    if (gguf := find_gguf(source, gguf_file)) is not None:
        return load_gguf_tokenizer(gguf)
    if Path(source).is_dir():
        for path in Path(source).glob("*token*.json"):
            read_json(path, *(["model"] if path.name == "tokenizer.json" else []))
    declared = get_tokenizer_config(os.fspath(source), **kwargs).get("tokenizer_class")
    generic = declared in ("TokenizersBackend", "PreTrainedTokenizerFast")
    try:
        if generic:
            return PreTrainedTokenizerFast.from_pretrained(source, **kwargs)
        # The default of transformers asks the user, and may then run code of the repository.
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **kwargs)
    except OSError:
        raise  # its message names what is missing
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ValueError(f"the tokenizer in {source} could not be read; are its files complete? {error!r}") from error
