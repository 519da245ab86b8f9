"""The captioning pipeline of transformers: from images to captions."""

import difflib
import inspect
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, GenerationConfig, Pipeline

GENERATION_PARAMETERS = {"generation_config", *(name for name in vars(GenerationConfig()) if not name.startswith("_"))}


def trim_caption(text: str) -> str:
    """Removes an unfinished last sentence, and sentences that repeat an earlier one, from a caption.

    The authors' code does this to every caption, because its models do not learn to end them. A text without a full
    stop is not cut.
    """
    end = text.rfind(".")
    if end >= 0:
        text = text[: end + 1]
    return " ".join(dict.fromkeys(part for part in re.split(r"(?<=[.!?])\s+", text) if part))


class VLVCaptioningPipeline(Pipeline):
    r"""
    Captions images. Takes one image, a list or another sequence, a generator or a dataset; `batch_size` batches them.

    An image is anything that `VLVImageProcessor` reads (PIL, path, URL, bytes, array), or a mapping
    `{"caption_embeds": tensor}` with its caption embeddings `(Q, d_text)`.

    Arguments of the constructor and of the call, which comes first:
        text (`str`, *optional*):
            An instruction that the model was trained to follow (`model.config.instructions`), or the beginning of the
            caption, which the language model continues.
        trim (`bool`, *optional*, defaults to `False`): Remove an unfinished last sentence and repeated sentences.
        generate_kwargs (`dict`, *optional*): Arguments of the model's `generate`, such as `num_beams`.
        generation_config (`GenerationConfig`, *optional*): Replaces the model's. The call's also replaces all
            generation parameters of the constructor.
        max_new_tokens (`int`, *optional*): Maximum number of tokens of a caption. This and every other parameter of a
            `GenerationConfig` may stand here instead of in `generate_kwargs`.
        batch_size, num_workers (`int`, *optional*): Of the data loader.

    Returns for each image `[{"generated_text": str}]`, with `num_return_sequences` entries.

    Raises a `TypeError` for unknown arguments, and a `ValueError` for an argument that is given twice and for images
    and caption embeddings that it cannot read.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_video_processor = False
    _pipeline_calls_generate = True  # the constructor keeps generation parameters for `_prepare_generate_kwargs`

    @property
    def _registered_impl(self) -> dict[str, Any]:
        """What `save_pretrained` writes into the configuration, so that `transformers.pipeline` finds this class."""
        return {"image-to-text": {"impl": type(self), "pt": (AutoModelForImageTextToText,)}}

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Saves the model, its processor and the code of this pipeline.

        Args:
            save_directory: A folder, which is created if it does not exist.
            push_to_hub: Whether to upload them as well.
            kwargs: Arguments of `push_to_hub` and of the model's `save_pretrained`. `repo_id` is by default the
                folder's name.
        """
        names = inspect.signature(self.push_to_hub).parameters.keys() - {"max_shard_size"}
        upload = {name: kwargs.pop(name) for name in names & kwargs.keys()}
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)
        if push_to_hub:
            self.push_to_hub(**{"repo_id": Path(save_directory).name, **upload})

    def _sanitize_parameters(
        self,
        text: str | None = None,
        trim: bool | None = None,
        generate_kwargs: Mapping[str, Any] | None = None,
        local_files_only: bool | None = None,  # `transformers.pipeline` passes it on
        **kwargs,
    ):
        constructing = not hasattr(self, "_forward_params")
        if constructing and not (self.model.can_generate() and self.processor is not None):
            raise ValueError(
                f"{type(self).__name__} needs a VLVForConditionalGeneration as model and its VLVProcessor as "
                f"processor, got {type(self.model).__name__} and {type(self.processor).__name__}"
            )
        for name in kwargs.keys() - GENERATION_PARAMETERS:
            known = ["text", "trim", "generate_kwargs", "batch_size", "num_workers", *GENERATION_PARAMETERS]
            known += inspect.signature(Pipeline.__init__).parameters if constructing else ()
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "arguments of generate() go into generate_kwargs={...}"
            raise TypeError(f"{type(self).__name__} got an unknown argument {name!r}; {hint}")
        given = {**self._generate_kwargs, **kwargs} if constructing else kwargs
        for name in given.keys() & (generate_kwargs or {}).keys():
            raise ValueError(f"{name} is given twice, as an argument and in generate_kwargs; leave one out")
        generation = {**kwargs, **(generate_kwargs or {})}
        if constructing:
            self._generate_kwargs |= generation
            generation = {}
        preprocessing = {} if text is None else {"text": text}
        return preprocessing, generation, {} if trim is None else {"trim": trim}

    def __call__(
        self, inputs: Any, *, num_workers: int | None = None, batch_size: int | None = None, **kwargs: Any
    ) -> Any:
        if isinstance(inputs, Sequence) and not isinstance(inputs, str | bytes | bytearray | memoryview):
            inputs = list(inputs)  # a tuple, or a column of a data set
            if not inputs:
                return []
        return super().__call__(inputs, num_workers=num_workers, batch_size=batch_size, **kwargs)

    def preprocess(self, inputs: Any, text: str | None = None) -> dict[str, torch.Tensor]:
        text_inputs = {} if text is None else dict(self.processor(text=text))
        if isinstance(inputs, Mapping) and "caption_embeds" in inputs:
            embeds = torch.as_tensor(inputs["caption_embeds"])
            embeds = embeds[None] if embeds.ndim == 2 else embeds
            expected = (1, self.model.config.num_query_tokens, self.model.config.caption_embed_dim)
            if tuple(embeds.shape) != expected:  # transformers would pad a batch of unequal lengths with zeros
                raise ValueError(
                    f"caption_embeds of one image must be {expected[1:]}, got {tuple(embeds.shape)}; for another "
                    "number of embeddings call the model's generate(caption_embeds=...)"
                )
            return {"caption_embeds": embeds, **text_inputs}
        pixel_values = self.processor(images=inputs).pixel_values
        if len(pixel_values) != 1:
            raise ValueError(f"one input holds {len(pixel_values)} images; pass a list with one image in each place")
        return {"pixel_values": pixel_values.to(self.dtype or pixel_values.dtype), **text_inputs}

    def _forward(self, model_inputs: dict[str, torch.Tensor], **generate_kwargs) -> dict[str, torch.Tensor]:
        if self.assistant_model is not None:
            generate_kwargs["assistant_model"] = self.assistant_model
        ids = self.model.generate(**model_inputs, **self._prepare_generate_kwargs(generate_kwargs))
        if isinstance(ids, Mapping):
            ids = ids["sequences"]
        image_inputs = model_inputs.get("pixel_values", model_inputs.get("caption_embeds"))
        batch_size = len(image_inputs) if image_inputs is not None else 1
        return {"generated_ids": ids.view(batch_size, -1, ids.shape[-1])}  # (B, num_return_sequences, length)

    def postprocess(self, model_outputs: dict[str, torch.Tensor], trim: bool = False) -> list[dict[str, str]]:
        ids = model_outputs["generated_ids"]
        texts = self.processor.batch_decode(ids.reshape(-1, ids.shape[-1]), skip_special_tokens=True)
        return [{"generated_text": trim_caption(text) if trim else text.strip()} for text in texts]
