"""Tokenizers, loaded as they were saved."""

import os
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from .files import read_json


def load_tokenizer(source: str | os.PathLike, **kwargs: Any) -> Any:
    """A tokenizer as it was saved.

    transformers 5 takes every tokenizer beside a Qwen2 (and some others) for Qwen2's own, whatever its configuration
    says, and then reads another one's words as nonsense without a warning. A generic one is therefore loaded as such.
    """
    if Path(source).is_dir():
        for path in Path(source).glob("*token*.json"):
            read_json(path, *(["model"] if path.name == "tokenizer.json" else []))
    declared = get_tokenizer_config(os.fspath(source), **kwargs).get("tokenizer_class")
    generic = declared in ("TokenizersBackend", "PreTrainedTokenizerFast")
    try:
        if generic:
            return PreTrainedTokenizerFast.from_pretrained(source, **kwargs)
        # By default transformers would ask, and then run code out of the repository.
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **kwargs)
    except OSError:
        raise  # says what is missing
    except Exception as error:  # the tokenizers library raises nothing more exact
        raise ValueError(f"the tokenizer in {source} cannot be read; are its files whole? {error!r}") from error
