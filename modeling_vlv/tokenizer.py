"""Loads tokenizers as they were saved, and checks that they belong to their language models."""

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


def fit_tokenizer(tokenizer: Any, language_model: Any) -> Any:
    """Gives a tokenizer the EOS and padding tokens that it lacks, out of its own vocabulary, which does not grow.

    EOS is that of the language model's configuration. Padding is that of the configuration, too, if it is a special
    token already: an ordinary word would become one, and captions would lose it. Otherwise padding is EOS: labels are
    masked where padding was added, not where its token is, so that EOS is learnt in any case. BOS is not needed,
    because the caption embeddings begin the sequence.

    Args:
        language_model: The model, or its configuration.

    Raises:
        ValueError: If there is no EOS token in either.
    """
    vocabulary = tokenizer.get_vocab()
    words = {index: word for word, index in vocabulary.items()}
    ends = eos_ids(language_model)
    if tokenizer.eos_token_id is None:
        if (word := next((words[i] for i in ends if i in words), None)) is None:
            raise ValueError(
                f"{name_of(tokenizer, 'the tokenizer')} has no EOS token, and the configuration of "
                f"{name_of(language_model, 'the language model')} names none (eos_token_id), so no caption would end; "
                "set eos_token in tokenizer_config.json"
            )
        tokenizer.eos_token = word
    if tokenizer.pad_token_id is None:
        padding = getattr(_text_config(language_model), "pad_token_id", None)
        added = tokenizer.added_tokens_decoder.get(padding)
        tokenizer.pad_token = added.content if added is not None and added.special else tokenizer.eos_token
    return tokenizer


def check_tokenizer(tokenizer: Any, language_model: Any, model_source: str | None = None) -> None:
    """Raises `ValueError` if a tokenizer is not that of a language model.

    It is not if a token has an id beyond the embeddings, or captions would end with an EOS at which the language
    model does not stop. A special token that no caption has, such as an image token, may lie beyond them.

    Args:
        language_model: The model.
        model_source: What the message calls the model; by default where it was loaded from.
    """
    tokens = name_of(tokenizer, "the tokenizer")
    model = model_source or name_of(language_model, "the language model")
    remedy = "use the language model with its own tokenizer: both lie in one folder or repository"
    rows = language_model.get_input_embeddings().weight.shape[0]
    unused = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} - {
        tokenizer.eos_token,
        tokenizer.pad_token,
    }
    word, largest = max(
        ((word, index) for word, index in tokenizer.get_vocab().items() if word not in unused),
        key=lambda pair: pair[1],
    )
    if largest >= rows:
        raise ValueError(
            f"the tokenizer {tokens} does not belong to the language model {model}: its token {word!r} has the id "
            f"{largest}, but the model has embeddings of {rows} tokens; {remedy}"
        )
    ends = eos_ids(language_model)
    if ends and tokenizer.eos_token_id not in ends:
        names = [tokenizer.convert_ids_to_tokens(i) for i in ends if i < len(tokenizer)]
        raise ValueError(
            f"the tokenizer {tokens} does not belong to the language model {model}: it ends texts with "
            f"{tokenizer.eos_token!r} (id {tokenizer.eos_token_id}), but the model stops at "
            f"{', '.join(map(str, ends))} ({', '.join(map(repr, names))}; eos_token_id in config.json and "
            f"generation_config.json); {remedy}, or make eos_token and eos_token_id agree"
        )


def eos_ids(language_model: Any) -> list[int]:
    """The ids at which a language model stops, from its configuration and its generation settings."""
    found: list[int] = []
    for settings in (_text_config(language_model), getattr(language_model, "generation_config", None)):
        ids = getattr(settings, "eos_token_id", None)
        found += [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return list(dict.fromkeys(found))


def _text_config(language_model: Any) -> Any:
    return getattr(language_model, "config", language_model).get_text_config()


def name_of(part: Any, otherwise: str) -> str:
    """Where a tokenizer or model was loaded from, for a message."""
    settings = getattr(part, "config", part)
    return getattr(settings, "name_or_path", None) or otherwise
