"""The captioner's processor: images become pixel values, and text becomes token ids, image tokens among them.

Shapes in comments: B texts, N images, P tokens of a text prefix, L tokens of a caption or of a sequence.
"""

import difflib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from transformers import AddedToken, BatchFeature, PreTrainedConfig, ProcessorMixin
from transformers.processing_utils import MultiModalData, ProcessingKwargs, TextKwargs

from .processing_vlv import VLVImageProcessorKwargs, WithoutInheritedCode, write_code

# Placeholders of images in vocabularies of language models. Where there is none, the last one is added.
IMAGE_TOKENS = ("<|image_pad|>", "<|image|>", "<image_soft_token>", "<image>")
TEMPLATE_START = "{#- VLV -#}\n"
# Texts of messages with image tokens in them, in `ns.chat`, and the number of images and of turns.
_READ_MESSAGES = """\
{%- set ns = namespace(chat=[], images=0, turns=0, text='', words='') -%}
{%- for message in messages -%}
{%- set ns.text = '' -%}
{%- set ns.words = '' -%}
{%- set content = message['content'] or '' -%}
{%- if content is string -%}
{%- set ns.text = content -%}
{%- set ns.words = content -%}
{%- else -%}
{%- for part in content -%}
{%- if part['type'] in ['image', 'image_url'] -%}
{%- set ns.images = ns.images + 1 -%}
{%- set ns.text = ns.text ~ 'IMAGE_TOKEN' -%}
{%- elif part['type'] == 'text' -%}
{%- set ns.text = ns.text ~ part['text'] -%}
{%- set ns.words = ns.words ~ part['text'] -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'user' or (message['role'] == 'assistant' and not loop.last) -%}
{%- set ns.turns = ns.turns + 1 -%}
{%- endif -%}
{%- set ns.chat = ns.chat + [dict(message, content=ns.text, words=ns.words)] -%}
{%- endfor -%}
"""
# One image and one message: what a captioner is trained on. The image comes first, as in training, and nothing stands
# between the user's words and the caption.
_WRITE_CAPTION = """\
{%- set ns.words = '' -%}
{%- if ns.images -%}{{- 'IMAGE_TOKEN' -}}{%- endif -%}
{%- for message in ns.chat -%}
{%- if message['role'] == 'user' -%}
{{- message['words'] -}}
{%- set ns.words = message['words'] -%}
{%- elif message['role'] == 'assistant' -%}
{%- if ns.words and ns.words.strip() == ns.words -%}{{- ' ' -}}{%- endif -%}
{%- generation -%}{{- message['words'] ~ eos_token -}}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
"""
_SEVERAL = "{%- if ns.images > 1 or ns.turns > 1 -%}\n"
_REFUSE = """\
{{- raise_exception('a chat has one image and one message by the user, this one has ' ~ ns.images ~ ' images and ' ~
ns.turns ~ ' messages before the answer: the language model of this VLV has no chat template, so it knows no '
~ 'dialogue; make one chat of each image') -}}
"""
# Of version 0.2: the words of the user, and of a last message by the assistant, without the image.
LEGACY_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' or (message['role'] == 'assistant' and loop.last) %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endif %}{% endfor %}"
)


def build_chat_template(image_token: str, language_models_own: str | None = None) -> str:
    """A chat template that emits an image token for each image.

    Chats of one image and one message by the user are image, words, and a last message by the assistant. Others are
    rendered by the language model's own template, and are an error where it has none.
    """
    if language_models_own is not None and language_models_own.startswith(TEMPLATE_START):
        return language_models_own
    several = _REFUSE
    if language_models_own not in (None, LEGACY_CHAT_TEMPLATE):
        several = "{%- set messages = ns.chat -%}\n" + str(language_models_own) + "\n"
    template = _READ_MESSAGES + _SEVERAL + several + "{%- else -%}\n" + _WRITE_CAPTION + "{%- endif -%}"
    return TEMPLATE_START + template.replace("IMAGE_TOKEN", image_token)


def find_image_token(tokenizer: Any) -> str:
    """The image token of a tokenizer, to which it is added where the vocabulary has none."""
    if (own := getattr(tokenizer, "image_token", None)) is not None:
        return str(own)
    added = tokenizer.get_added_vocab()
    if (known := next((token for token in IMAGE_TOKENS if token in added), None)) is not None:
        return known
    tokenizer.add_tokens([AddedToken(IMAGE_TOKENS[-1], normalized=False, special=True)], special_tokens=True)
    return IMAGE_TOKENS[-1]


class VLVProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """
    append_eos (`bool`): Whether a suffix ends with EOS.
    pad_to_max_length (`bool`): Whether labels are padded to `max_length`.
    """

    images_kwargs: VLVImageProcessorKwargs
    append_eos: bool
    pad_to_max_length: bool


class VLVProcessor(WithoutInheritedCode, ProcessorMixin):
    r"""
    Images to `pixel_values`, words to `input_ids`, captions to `labels`.

    Words are one of two things. Without an image token they are a text prefix, which follows the image: `input_ids`
    are the prefix alone. With image tokens they are a whole sequence, as other vision-language models read it: each
    image token becomes `image_seq_length` of them, and the model puts the image's caption embeddings there.

    The image token is `tokenizer.image_token` if that is set, else a placeholder of images that the vocabulary has
    already, such as Qwen's `<|image_pad|>`, else `<image>`, which is added to the tokenizer (not to the model). The
    model never looks up its embedding, so that its id may lie beyond the embeddings: no weight of a model that is
    stored already changes, and neither do its captions. `VLVForConditionalGeneration.set_image_token` gives it an
    embedding for tools that need one.

    Args:
        image_processor ([`VLVImageProcessor`]): Prepares the images.
        tokenizer (`PreTrainedTokenizerBase`):
            The language model's own. It needs an EOS token. One without a padding token pads with EOS.
        chat_template (`str`, *optional*):
            By default an image, the words of the user, which may be empty, and of a last message by the assistant.
            Chats of several turns or images are those of the tokenizer's own chat template.
        image_seq_length (`int`, *optional*):
            Number of image tokens of an image: the model's `config.num_query_tokens`. `from_pretrained` reads it from
            the model's configuration where a processor lacks it.

    Raises:
        ValueError: If the tokenizer has no EOS token.
    """

    valid_processor_kwargs = VLVProcessorKwargs
    model_input_names = ["pixel_values", "input_ids", "attention_mask"]  # noqa: RUF012
    # A text prefix is padded on the left, because the caption follows it, and has no BOS or EOS.
    text_kwargs = {  # noqa: RUF012
        "add_special_tokens": False,
        "padding": True,
        "padding_side": "left",
        "return_attention_mask": True,
        "return_token_type_ids": False,
        "return_tensors": "pt",
    }
    images_kwargs = {"return_tensors": "pt"}  # noqa: RUF012
    append_eos = True
    pad_to_max_length = False

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, image_seq_length=None, **kwargs):
        if tokenizer is not None:
            if tokenizer.eos_token_id is None:
                raise ValueError("the tokenizer has no EOS token, so no caption would end; set tokenizer.eos_token")
            if tokenizer.pad_token_id is None:
                tokenizer.pad_token = tokenizer.eos_token
            own_template = tokenizer.chat_template
            self.image_token = find_image_token(tokenizer)
            self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
            if chat_template in (None, LEGACY_CHAT_TEMPLATE):
                own = own_template.get("default") if isinstance(own_template, dict) else own_template
                chat_template = build_chat_template(self.image_token, own)
        self.image_seq_length = image_seq_length
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Loads a processor. One that lacks `image_seq_length` has the number in the configuration of its model."""
        processor: Any = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if processor.image_seq_length is None:
            names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
            hub = {name: kwargs[name] for name in names if name in kwargs}
            with suppress(OSError):  # no model beside it: replace_image_token says how to set the number
                config, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub)
                processor.image_seq_length = config.get("num_query_tokens")
        return processor

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs) -> list[str]:
        """Writes the configurations, and the code that they name, into a folder or a Hub repository."""
        write_code([self, self.image_processor], Path(save_directory), getattr(self.image_processor, "_origin", ""))
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        suffix: str | list[str] | None = None,
        videos: None = None,
        audio: None = None,
        **kwargs,
    ) -> BatchFeature:
        """Prepares a batch.

        Args:
            images: One image or several, of any kind that [`VLVImageProcessor`] takes; or lists, one for each text.
            text (`str` or `list[str]`, *optional*):
                A text prefix between image and caption: an instruction that the model was trained to follow, or words
                that the caption continues; may be empty. One for all images, or one for each. It has no EOS and is
                padded on the left. Or whole sequences, with one image token for each image.
            suffix (`str` or `list[str]`, *optional*):
                Captions to train on, one for each image. They end with EOS, which is a label, too, and are padded on
                the right with -100 to the longest of the batch. After sequences with image tokens they are a part of
                `input_ids`, and `labels` are as long, -100 everywhere else.
            max_length (`int`, *optional*):
                Largest number of tokens of a suffix, EOS included. A longer one is cut and has no EOS. For `text` it
                counts with `truncation=True` or `padding="max_length"`.
            append_eos (`bool`, *optional*, defaults to `True`):
                Whether suffixes end with EOS. The authors' code adds none, so that its captions never learn to end.
            pad_to_max_length (`bool`, *optional*, defaults to `False`):
                Pads labels to `max_length`, as the authors' code does, instead of to the longest of the batch.
            return_tensors (`str`, *optional*, defaults to `"pt"`): `"pt"`, `"np"` or None for lists.
            kwargs: Arguments of transformers' image processors (`size`, `do_normalize`, ...) and tokenizers
                (`padding`, `truncation`, ...), also as `images_kwargs` and `text_kwargs`. Those of tokenizers do not
                work with a suffix after image tokens.

        Returns:
            `pixel_values` (N, 3, height, width), `input_ids` and `attention_mask` (B, P), `labels` (B, L): those that
            the arguments ask for. With `return_mm_token_type_ids=True` also `mm_token_type_ids`, 1 at image tokens.

        Raises:
            ValueError: If nothing is given, numbers of images, image tokens and texts differ, an argument does not
                work with a suffix, or an image cannot be read; the message gives the index of the image.
            TypeError: For an unknown argument; the message gives the nearest name.
        """
        if videos is not None or audio is not None:
            raise ValueError("VLV takes images and text, not videos or audio")
        if images is None and text is None and suffix is None:
            raise ValueError("give images, text or suffix")
        self._refuse_unknown(kwargs)
        given = {**kwargs, **(kwargs.get("common_kwargs") or {}), **(kwargs.get("text_kwargs") or {})}
        merged = self._merge_kwargs(VLVProcessorKwargs, **kwargs)
        return_tensors = merged["text_kwargs"].pop("return_tensors", None)
        data: dict[str, Any] = {}
        count: int | None = None
        if images is not None:
            data.update(self.image_processor(images, **merged["images_kwargs"]))
            count = len(data["pixel_values"])
        texts = [] if text is None else [text] if isinstance(text, str) else list(text)
        _require_strings(texts, "texts")
        captions = None if suffix is None else [suffix] if isinstance(suffix, str) else list(suffix)
        options = (merged["append_eos"], merged["pad_to_max_length"])
        if any(self.image_token in words for words in texts):
            if captions is not None:
                _refuse_text_arguments(given)
            _require_images_of_each(texts, images, self.image_token)
            data.update(self._encode_sequences(texts, count, captions, *options, return_tensors, merged))
            return BatchFeature(data)
        if text is not None:
            texts = texts * (count or 1) if isinstance(text, str) else texts
            if count is not None and len(texts) != count:
                raise ValueError(f"{len(texts)} texts for {count} images; give one for all, or one for each")
            data.update(self._encode_prefix(texts, return_tensors, merged["text_kwargs"]))
        if captions is not None:
            if count is not None and len(captions) != count:
                raise ValueError(f"{len(captions)} captions for {count} images; give one for each")
            labels = self._labels(captions, merged["text_kwargs"].get("max_length"), *options)
            data["labels"] = _convert(labels, return_tensors)
        return BatchFeature(data)

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs) -> str:
        """The image tokens of one image."""
        if self.image_seq_length is None:
            raise ValueError(
                "the processor does not know the number of image tokens of an image; set "
                "processor.image_seq_length = model.config.num_query_tokens"
            )
        return self.image_token * self.image_seq_length

    def _get_num_multimodal_tokens(self, image_sizes: list[tuple[int, int]] | None = None, **kwargs) -> MultiModalData:
        """Numbers of image tokens of images of these sizes, (height, width) in pixels."""
        if image_sizes is None:
            return MultiModalData()
        return MultiModalData(
            num_image_tokens=[self.image_seq_length] * len(image_sizes), num_image_patches=[1] * len(image_sizes)
        )

    def apply_chat_template(self, conversation: Any, *args, **kwargs) -> Any:
        """A chat, or several, as text; with `tokenize=True` as ids, with their images.

        As with other processors, ids are lists of different lengths unless `return_tensors` or `padding` is given.

        Raises:
            ValueError: If a chat has several images or turns, and the language model has no chat template of its own.
        """
        given = {**kwargs, **(kwargs.get("processor_kwargs") or {})}
        if kwargs.get("tokenize") and "padding" not in given:
            as_tensors = given.get("return_tensors") not in (None, "auto")
            kwargs["processor_kwargs"] = {**(kwargs.get("processor_kwargs") or {}), "padding": as_tensors}
        if kwargs.get("tokenize") and "return_tensors" not in given:
            kwargs["return_tensors"] = None
        try:
            return super().apply_chat_template(conversation, *args, **kwargs)
        except TemplateError as error:
            raise ValueError(str(error)) from error

    def _refuse_unknown(self, kwargs: dict[str, Any]) -> None:
        """Raises `TypeError` for a name that neither processor, image processor nor tokenizer knows."""
        images, text = set(VLVImageProcessorKwargs.__annotations__), set(TextKwargs.__annotations__)
        known = images | text | set(VLVProcessorKwargs.__annotations__) | {"common_kwargs"}
        nested = {"images_kwargs": images, "text_kwargs": text, "common_kwargs": images | text}
        unknown = [(name, known) for name in kwargs if name not in known]
        for group, names in nested.items():
            unknown += [(name, names) for name in kwargs.get(group) or {} if name not in names]
        for name, names in unknown:
            near = difflib.get_close_matches(name, [*names, "suffix", "images", "text"], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"VLVProcessor got an unknown argument {name!r}{hint}")

    def _encode_prefix(self, texts: list[str], return_tensors: str | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        if not kwargs.get("truncation") and kwargs.get("padding") != "max_length":
            kwargs = {name: value for name, value in kwargs.items() if name != "max_length"}
        encoded = self.tokenizer(texts, **kwargs)
        return {name: _convert(rows, return_tensors) for name, rows in encoded.items()}

    def _encode_sequences(
        self,
        texts: list[str],
        images: int | None,
        captions: list[str] | None,
        append_eos: bool,
        pad_to_max_length: bool,
        return_tensors: str | None,
        merged: dict[str, Any],
    ) -> dict[str, Any]:
        """`input_ids`, `attention_mask` and, of captions, `labels` `(B, L)` of texts with image tokens."""
        tokens = sum(text.count(self.image_token) for text in texts)
        if tokens != (images or 0):
            raise ValueError(
                f"the texts have {tokens} image tokens ({self.image_token}) for {images or 0} images; give each one"
            )
        text_kwargs = dict(merged["text_kwargs"])
        for name in ("return_mm_token_type_ids", "return_text_replacement_offsets"):
            text_kwargs.pop(name, None)
        if not text_kwargs.get("truncation") and text_kwargs.get("padding") != "max_length":
            text_kwargs.pop("max_length", None)
        replacements = [self.replace_image_token({}, index) for index in range(tokens)]
        texts, offsets = self.get_text_with_replacements(list(texts), replacements)
        if captions is not None:
            return self._append_captions(texts, captions, append_eos, pad_to_max_length, return_tensors, merged)
        encoded = self.tokenizer(texts, **text_kwargs)
        self._check_special_mm_tokens(texts, encoded, modalities=["image"])
        if merged.get("return_mm_token_type_ids"):
            encoded["mm_token_type_ids"] = self.create_mm_token_type_ids(encoded["input_ids"])
        data = {name: _convert(rows, return_tensors) for name, rows in encoded.items()}
        if merged.get("return_text_replacement_offsets"):
            data["text_replacement_offsets"] = offsets
        return data

    def _append_captions(
        self,
        texts: list[str],
        captions: list[str],
        append_eos: bool,
        pad_to_max_length: bool,
        return_tensors: str | None,
        merged: dict[str, Any],
    ) -> dict[str, Any]:
        """`input_ids`, `attention_mask` and `labels` `(B, L)` of texts, each with its caption after it."""
        if len(captions) != len(texts):
            raise ValueError(f"{len(captions)} captions for {len(texts)} texts; give one for each")
        max_length = merged["text_kwargs"].get("max_length")
        labels = self._labels(captions, max_length, append_eos, pad_to_max_length)
        prefixes = self.tokenizer(texts, add_special_tokens=False).input_ids
        rows = [prefix + [i for i in own if i != -100] for prefix, own in zip(prefixes, labels, strict=True)]
        longest = max(map(len, rows)) if not pad_to_max_length else max(map(len, prefixes)) + int(max_length or 0)
        padding = [longest - len(row) for row in rows]
        pad = self.tokenizer.pad_token_id
        data = {
            "input_ids": [row + [pad] * missing for row, missing in zip(rows, padding, strict=True)],
            "attention_mask": [[1] * len(row) + [0] * missing for row, missing in zip(rows, padding, strict=True)],
            "labels": [
                [-100] * len(prefix) + row[len(prefix) :] + [-100] * missing
                for prefix, row, missing in zip(prefixes, rows, padding, strict=True)
            ],
        }
        return {name: _convert(values, return_tensors) for name, values in data.items()}

    def _labels(
        self, captions: list[str], max_length: int | None, append_eos: bool, pad_to_max_length: bool
    ) -> list[list[int]]:
        _require_strings(captions, "captions")
        if pad_to_max_length and max_length is None:
            raise ValueError("pad_to_max_length needs max_length")
        end = [self.tokenizer.eos_token_id] if append_eos else []
        rows = [(ids + end)[:max_length] for ids in self.tokenizer(captions, add_special_tokens=False).input_ids]
        padded = self.tokenizer.pad(
            {"input_ids": rows},
            padding="max_length" if pad_to_max_length else "longest",
            max_length=max_length,
            padding_side="right",
            return_attention_mask=True,
        )
        return [
            [token if counted else -100 for token, counted in zip(ids, mask, strict=True)]
            for ids, mask in zip(padded["input_ids"], padded["attention_mask"], strict=True)
        ]


def _require_strings(values: list[Any], what: str) -> None:
    if wrong := [value for value in values if not isinstance(value, str)]:
        raise ValueError(f"{what} must be strings, got {type(wrong[0]).__name__}")


def _refuse_text_arguments(given: dict[str, Any]) -> None:
    """Raises `ValueError` for an argument of tokenizers that sequences with captions do not follow."""
    followed: dict[str, tuple] = {
        "padding": (None, True, "longest"),
        "padding_side": (None, "right"),
        "return_attention_mask": (None, True),
    }
    for name in (name for name in given if name in TextKwargs.__annotations__):
        if name not in ("max_length", "return_tensors") and given[name] not in followed.get(name, (None, False)):
            raise ValueError(
                f"{name}={given[name]!r} does not work with suffix after image tokens: sequences are padded on the "
                "right to the longest, and max_length cuts suffixes alone; leave it out"
            )


def _require_images_of_each(texts: list[str], images: Any, image_token: str) -> None:
    """Raises `ValueError` if images in lists, one for each text, are not as many as the image tokens of that text."""
    if not isinstance(images, (list, tuple)) or not all(isinstance(own, (list, tuple)) for own in images):
        return
    if any(isinstance(item, (int, float, list, tuple)) for own in images for item in own):
        return  # an image as nested lists
    if len(images) != len(texts):
        raise ValueError(f"{len(images)} lists of images for {len(texts)} texts; give each text its list")
    for index, (text, own) in enumerate(zip(texts, images, strict=True)):
        if (tokens := text.count(image_token)) != len(own):
            raise ValueError(
                f"text {index} has {tokens} image tokens ({image_token}), but its list has {len(own)} images"
            )


def _convert(rows: list[list[int]], return_tensors: str | None) -> Any:
    """Rows of equal length as int64, also where that length is 0, which the libraries would make float."""
    if return_tensors is None:
        return rows
    values = np.asarray(rows, dtype=np.int64)
    return torch.from_numpy(values) if return_tensors == "pt" else values


__all__ = ["VLVProcessor"]
