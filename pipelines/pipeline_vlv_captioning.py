"""The captioning pipeline of transformers: from images to captions."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import Pipeline


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
    Captions images. Takes one image, a list, a generator or a dataset; `batch_size` batches them.

    An image is anything that `VLVImageProcessor` reads (PIL, path, URL, bytes, array), or a mapping
    `{"caption_embeds": tensor}` with its caption embeddings `(Q, d_text)`.

    Call arguments:
        text (`str`, *optional*): Beginning of the caption, which the language model continues.
        max_new_tokens (`int`, *optional*): Maximum number of tokens of a caption.
        trim (`bool`, *optional*, defaults to `False`): Remove an unfinished last sentence and repeated sentences.
        generate_kwargs (`dict`, *optional*): Arguments of the model's `generate`, such as `num_beams`.

    Returns for each image `[{"generated_text": str}]`, with `num_return_sequences` entries.

    Raises a `ValueError` for unknown arguments, and for images and caption embeddings that it cannot read.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_video_processor = False

    def _sanitize_parameters(
        self,
        text: str | None = None,
        max_new_tokens: int | None = None,
        trim: bool = False,
        generate_kwargs: dict[str, Any] | None = None,
        **kwargs,
    ):
        if kwargs:
            raise ValueError(
                f"unknown arguments {sorted(kwargs)}; expected text, max_new_tokens, trim, or generate_kwargs={{...}}"
            )
        generation = dict(generate_kwargs or {})
        if max_new_tokens is not None:
            if "max_new_tokens" in generation:
                raise ValueError("max_new_tokens is given twice, as an argument and in generate_kwargs; leave one out")
            generation["max_new_tokens"] = max_new_tokens
        return {} if text is None else {"text": text}, generation, {"trim": trim}

    def preprocess(self, inputs: Any, text: str | None = None) -> dict[str, torch.Tensor]:
        text_inputs = {} if text is None else dict(self.processor(text=text))
        if isinstance(inputs, Mapping) and "caption_embeds" in inputs:
            embeds = torch.as_tensor(inputs["caption_embeds"])
            embeds = embeds[None] if embeds.ndim == 2 else embeds
            expected = (1, self.model.config.num_query_tokens, self.model.config.text_encoder_config.hidden_size)
            if tuple(embeds.shape) != expected:  # transformers would pad a batch of unequal lengths with zeros
                raise ValueError(
                    f"caption_embeds of one image must be {expected[1:]}, got {tuple(embeds.shape)}; for another "
                    "number of embeddings call the model's generate(caption_embeds=...)"
                )
            return {"caption_embeds": embeds, **text_inputs}
        pixel_values = self.processor(images=inputs).pixel_values
        return {"pixel_values": pixel_values.to(self.dtype or pixel_values.dtype), **text_inputs}

    def _forward(self, model_inputs: dict[str, torch.Tensor], **generate_kwargs) -> dict[str, torch.Tensor]:
        ids = self.model.generate(**model_inputs, **generate_kwargs)
        if isinstance(ids, Mapping):
            ids = ids["sequences"]
        image_inputs = model_inputs.get("pixel_values", model_inputs.get("caption_embeds"))
        batch_size = len(image_inputs) if image_inputs is not None else 1
        return {"generated_ids": ids.view(batch_size, -1, ids.shape[-1])}  # (B, num_return_sequences, length)

    def postprocess(self, model_outputs: dict[str, torch.Tensor], trim: bool = False) -> list[dict[str, str]]:
        ids = model_outputs["generated_ids"]
        texts = self.processor.batch_decode(ids.reshape(-1, ids.shape[-1]), skip_special_tokens=True)
        return [{"generated_text": trim_caption(text) if trim else text.strip()} for text in texts]
