"""VLV's captioner: a language model decodes the conditioning of caption embeddings into a caption.

Shapes in comments: B sequences, N images, Q query tokens, P tokens of a text prefix, L tokens of a caption or of a
sequence, d_text the width of a caption embedding, d_lm the width of the language model.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    Cache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .generation_vlv import (
    CACHE,
    Backbone,
    PromptStreamer,
    after_prompt,
    caption_cache,
    check_generation_arguments,
    check_text_prefix,
    count_new_tokens,
    mask_and_positions,
    merge_settings,
    padding_first,
    refuse_labels_of_the_prefix,
    refuse_long_prefix,
    require_kept,
    require_one_image_input,
)
from .modeling_vlv import VLVConfig, VLVModel, VLVPreTrainedModel, VLVProjector, from_sub_configs


@dataclass
class VLVCausalLMOutput(CausalLMOutputWithPast):
    """
    Args:
        loss (`torch.Tensor` of shape `()`, returned when `labels` are given):
            Next-token cross-entropy over the labels that are not -100.
        logits (`torch.Tensor`):
            `(B, L, vocab)` with labels: `logits[:, i]` predicts `labels[:, i]`. `(B, 1, vocab)` without labels: the
            next token. `(B, Q + P + L, vocab)` with `full_logits=True`. None in training, unless asked for.
        hidden_states (`tuple[torch.Tensor]`, returned with `output_hidden_states=True`):
            Of the language model, as it returns them: its embeddings and the output of each layer, each
            `(B, Q + P + L, d_lm)`, prefix included.
        attentions (`tuple[torch.Tensor]`, returned with `output_attentions=True`):
            Attention weights of each layer of the language model, `(B, heads, Q + P + L, Q + P + L)`.
        past_key_values (`Cache`, returned with `use_cache=True`; `cache` from transformers 5.24 on):
            Keys and values of the language model, over the same positions.
        caption_embeds (`torch.Tensor` of shape `(B, Q, d_text)`):
            The caption embeddings that the language model read.
    """

    caption_embeds: torch.Tensor | None = None


class VLVForConditionalGeneration(VLVPreTrainedModel, GenerationMixin):
    """The captioner: a [`VLVModel`], a projection, and a causal language model that reads the conditioning.

    Raises:
        ValueError: If the configuration is a stage-1 model's, which has no language model.
    """

    def __init__(self, config: VLVConfig):
        if config.text_config is None:
            raise ValueError(
                "this is a stage-1 checkpoint: it has no language model, so it reconstructs images but writes no "
                "captions. Load it as VLVModel, or start stage 2 with "
                "VLVForConditionalGeneration.from_vlv_text_pretrained(this_checkpoint, a_language_model)"
            )
        super().__init__(config)
        self.model = VLVModel._from_config(config)
        text_config = config.text_config.get_text_config()
        d_lm = getattr(text_config, "word_embed_proj_dim", None) or text_config.hidden_size  # the first is OPT's
        self.language_projection = VLVProjector(config.conditioning_dim, d_lm)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config, trust_remote_code=False)
        self.loss_type = "ForMaskedLM"  # cross-entropy without a shift: logits[:, i] predicts labels[:, i]
        self.post_init()
        self.generation_config = GenerationConfig.from_model_config(config.text_config)

    @classmethod
    def from_vlv_text_pretrained(
        cls, vlv: str | VLVModel, language_model: str | PreTrainedModel, *, dtype: torch.dtype = torch.float32
    ) -> VLVForConditionalGeneration:
        """Starts stage 2 from a stage-1 model and a pretrained causal language model. The projection is new.

        Set `model.config.image_token_id = processor.image_token_id` before `input_ids` hold image tokens.

        Args:
            vlv (`str` or `VLVModel`): Folder or repo id of a stage-1 model, or the model.
            language_model (`str` or `PreTrainedModel`):
                Folder or repo id of a causal language model, e.g. `Qwen/Qwen2.5-3B`, or the model.
            dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
                Precision of all parts, whatever they are stored in. Training in mixed precision needs full weights.
        """
        encoder: Any = VLVModel.from_pretrained(vlv) if isinstance(vlv, str) else vlv
        if isinstance(language_model, str):
            language_model = AutoModelForCausalLM.from_pretrained(language_model)
        own = {item.name: getattr(encoder.config, item.name) for item in fields(VLVConfig) if item.init}
        not_own = {"image_token_id", "instructions", *PreTrainedConfig.__dataclass_fields__}  # another captioner's
        own = {name: value for name, value in own.items() if name not in not_own}
        sub_configs = {name: own.pop(name) for name in VLVConfig.sub_configs_defaults}
        sub_configs = {name: config for name, config in sub_configs.items() if config is not None}
        model = from_sub_configs(cls, {**sub_configs, "text_config": language_model.config}, dtype, **own)
        model.model.load_state_dict(encoder.state_dict())
        model.language_model.load_state_dict(language_model.state_dict())
        if language_model.generation_config is not None:
            model.generation_config = GenerationConfig.from_dict(language_model.generation_config.to_dict())
        return model.eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Loads a captioner. Of one that is stored without `image_token_id`, the processor beside it tells the id."""
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.config.image_token_id is None and pretrained_model_name_or_path is not None:
            names = ("cache_dir", "local_files_only", "token", "revision", "subfolder")
            hub = {name: kwargs[name] for name in names if name in kwargs}
            with suppress(OSError, ValueError):  # no processor, or none that loads without code of the repository
                processor = AutoProcessor.from_pretrained(
                    pretrained_model_name_or_path, trust_remote_code=False, **hub
                )
                model.config.image_token_id = getattr(processor, "image_token_id", None)
        return loaded

    @property
    def base_model(self) -> Any:
        """The encoder's attributes; called, the captioner without the language model's output layer."""
        return Backbone(self)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def get_decoder(self, modality: str | None = None):
        return self.language_model.get_decoder()

    def set_image_token(self, image_token_id: int) -> None:
        """Names the token that stands for images in `input_ids`: `VLVProcessor.image_token_id`.

        Where it has no embedding, it gets one, and the tied weights of the language model stay tied. This model works
        without: it never looks the embedding up. Tools that score every token of a prompt, such as TRL's trainers
        where no mask leaves the prompt out, need its logit. `generate` does not write it.
        """
        if image_token_id >= self._num_embeddings():
            self.resize_token_embeddings(image_token_id + 1)
        former = (self.config.image_token_id, image_token_id)
        suppressed = [token for token in self.generation_config.suppress_tokens or [] if token not in former]
        self.generation_config.suppress_tokens = [*suppressed, image_token_id]
        self.config.image_token_id = image_token_id

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """As [`VLVModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def get_prefix(
        self,
        pixel_values: torch.Tensor | None = None,
        caption_embeds: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        conditioning: torch.Tensor | None = None,
        image_indices: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The embeddings that the language model reads before the caption: image prefix, then an optional text prefix.

        Returns:
            Embeddings `(B, Q + P, d_lm)`, their mask `(B, Q + P)`, and caption embeddings `(B, Q, d_text)` or None.
            Padding of a text prefix is moved to the front, so that the last position always precedes the caption.

        Raises:
            ValueError: If `input_ids` and images differ in number, the mask has another shape than `input_ids` or
                belongs to nothing, `inputs_embeds` are given beside `input_ids`, or the prefix is longer than the
                language model can read.
        """
        images = {"pixel_values": pixel_values, "caption_embeds": caption_embeds, "image_features": image_features}
        require_one_image_input({**images, "conditioning": conditioning})
        if input_ids is not None:
            self._refuse_unknown_ids(input_ids)
        if conditioning is None:
            output = self.model(**images)
            conditioning, caption_embeds = output.conditioning, output.caption_embeds
        token_embeddings = self.get_input_embeddings()
        prefix = self._project(conditioning)  # (B, Q, d_lm)
        if image_indices is not None:
            prefix = prefix.index_select(0, image_indices)
        mask = torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device)
        if input_ids is not None and inputs_embeds is not None:
            raise ValueError("pass the text prefix as input_ids or as inputs_embeds, not as both")
        text = inputs_embeds if input_ids is None else input_ids
        if text is None and attention_mask is not None:
            raise ValueError("attention_mask belongs to a text prefix; pass input_ids, too, or leave it out")
        if attention_mask is not None and not torch.compiler.is_compiling() and not attention_mask.any():
            text = None  # padding alone
        if text is not None and text.shape[1]:
            attention_mask = check_text_prefix(
                text, attention_mask, len(prefix), "inputs_embeds" if input_ids is None else "input_ids"
            )
            words = token_embeddings(input_ids) if inputs_embeds is None else inputs_embeds  # (B, P, d_lm)
            prefix = torch.cat([prefix, words.to(prefix)], dim=1)  # (B, Q + P, d_lm)
            mask = torch.cat([mask, attention_mask.to(mask)], dim=1)
            refuse_long_prefix(self.config, mask)
            prefix, mask = padding_first(prefix, mask)
        return prefix, mask, caption_embeds

    def _project(self, conditioning: torch.Tensor) -> torch.Tensor:
        """Conditioning `(N, Q, d_cond)` as embeddings of the language model `(N, Q, d_lm)`."""
        projected = self.language_projection(conditioning.to(self.language_projection.linear_1.bias.dtype))
        return projected.to(self.get_input_embeddings().weight.dtype)

    def _num_embeddings(self) -> int:
        """Tokens that have an embedding; 0 where other processes hold them."""
        weight: Any = self.get_input_embeddings().weight
        return weight.shape[0]

    def _are_image_tokens(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`(B, L)` bool: the tokens `config.image_token_id`; where it is not set, those beyond the embeddings."""
        token, rows = self.config.image_token_id, self._num_embeddings()
        beyond = rows if token is None and rows else torch.iinfo(torch.long).max
        return input_ids >= beyond if token is None else input_ids == token

    def _is_sequence(
        self, input_ids: torch.Tensor, labels: torch.Tensor | None, past_key_values: Cache | None
    ) -> bool:
        """Whether `input_ids` are a sequence with image tokens, and not a text prefix."""
        if past_key_values is not None:
            return True
        if not torch.compiler.is_compiling():
            return bool(self._are_image_tokens(input_ids).any())
        if labels is not None and labels.shape == input_ids.shape and labels.shape[1] >= self.config.num_query_tokens:
            return True
        message = "compiled: image tokens need labels as long as input_ids"
        torch._assert_async(~self._are_image_tokens(input_ids).any(), message)
        return False

    def _refuse_unknown_ids(self, input_ids: torch.Tensor) -> None:
        """Raises `ValueError` for a token without embedding, such as an image token that the model does not know."""
        rows = self._num_embeddings()
        if torch.compiler.is_compiling() or not rows or not input_ids.numel() or (top := int(input_ids.max())) < rows:
            return
        raise ValueError(
            f"input_ids hold the id {top}, but the language model has embeddings of {rows} tokens; if it is the image "
            "token of the processor, call model.set_image_token(processor.image_token_id) first"
        )

    def get_prompt_embeds(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        caption_embeds: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of words and, in place of the image tokens, of images: Q image tokens for each of the N images.

        Images are taken in the order of the image tokens, row by row. A row has any number of images.

        Returns:
            Embeddings `(B, L, d_lm)`, and the caption embeddings `(N, Q, d_text)`.

        Raises:
            ValueError: If image tokens and caption embeddings differ in number.
        """
        output = self.model(pixel_values=pixel_values, caption_embeds=caption_embeds, image_features=image_features)
        images = self._project(output.conditioning)  # (N, Q, d_lm)
        is_image = self._are_image_tokens(input_ids)  # (B, L)
        if torch.compiler.is_compiling():
            message = "compiled: labels as long as input_ids, but not one image token for each caption embedding"
            torch._assert_async(is_image.sum() == images.shape[0] * images.shape[1], message)
        elif int(is_image.sum()) != images.shape[0] * images.shape[1]:
            raise ValueError(
                f"Image features and image tokens do not match, tokens: {int(is_image.sum())}, features: "
                f"{len(images)} images x {images.shape[1]}; VLVProcessor repeats an image token as often as needed"
            )
        # The image token may lie beyond the embeddings: it is never looked up.
        words = input_ids.masked_fill(is_image, 0)
        self._refuse_unknown_ids(words)
        embeds = self.get_input_embeddings()(words)  # (B, L, d_lm)
        return embeds.masked_scatter(is_image[..., None].to(embeds.device), images.to(embeds)), output.caption_embeds

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        caption_embeds: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_logits: bool | None = None,
        full_logits: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        image_features: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_token_type_ids: torch.Tensor | None = None,
        conditioning: torch.Tensor | None = None,
        image_indices: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> VLVCausalLMOutput:
        """Next-token loss and logits of captions, given their images, in one of two forms.

        If `input_ids` hold `config.image_token_id`, they are a whole sequence, as other vision-language models take
        it: `(B, L)` words, and Q image tokens for each image, which caption embeddings replace. `attention_mask` and
        `labels` are `(B, L)`, too (image tokens and -100 are no label, and `labels[:, i + 1]` is predicted at `i`);
        `logits` are those of every position, or of `logits_to_keep`. A call with `past_key_values` goes on after the
        positions in it, and has images only where `input_ids` hold image tokens.

        A compiled call does not read values to choose a form: it has a sequence where `past_key_values` are given, or
        `labels` are as long as `input_ids` and these have room for an image. A wrong choice fails an assertion.

        Otherwise images come first, and the following holds:

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, height, width)`): Images. Or give `caption_embeds`.
            caption_embeds (`torch.Tensor` of shape `(B, Q, d_text)`): Caption embeddings that exist already.
            input_ids (`torch.Tensor` of shape `(B, P)`, *optional*): A text prefix, also of length 0, without loss.
            attention_mask (`torch.Tensor` of shape `(B, P)`, *optional*): Of the text prefix, padded on either side.
            labels (`torch.Tensor` of shape `(B, L)`, *optional*):
                The caption alone, its EOS included, padded on the right with -100.
            return_logits (`bool`, *optional*):
                By default logits are returned, except in training with labels. There they are computed only at the
                positions that predict a label.
            full_logits (`bool`, *optional*, defaults to `False`): Returns logits of every position, prefix included.
            num_items_in_batch (`int`, *optional*):
                Divisor of the summed loss, for gradient accumulation: the number of labels that are neither -100 nor
                image tokens.
            inputs_embeds (`torch.Tensor` of shape `(B, P, d_lm)`, *optional*): The text prefix as embeddings.
            use_cache (`bool`, *optional*): Returns `past_key_values`. Off by default.
            image_features (`torch.Tensor` of shape `(B, P, d_model)`): As in [`VLVModel`]. In place of images.
            conditioning (`torch.Tensor` of shape `(B, Q, d_cond)`): As [`VLVModel`] gives it. In place of images.
            image_indices (`torch.Tensor` of shape `(B,)`, *optional*): The image of each row, if there are fewer.
            position_ids, past_key_values, logits_to_keep: Of the form with image tokens, as in other models.
            cache: `past_key_values`, by their name from transformers 5.24 on.
            mm_token_type_ids: Of the processor. Without effect: `input_ids` tell where images are.
            kwargs: `output_hidden_states`, `output_attentions` (needs `attn_implementation="eager"`), `return_dict`.

        Raises:
            ValueError: If labels and images differ in number, or the labels repeat `input_ids`.
            TypeError: For an argument that has no effect.
        """
        self._refuse_unused(kwargs)
        past_key_values = past_key_values if cache is None else cache
        recorded = {
            name: getattr(self.config, name) if kwargs.get(name) is None else kwargs[name]
            for name in ("output_hidden_states", "output_attentions")
        }
        images = {"pixel_values": pixel_values, "caption_embeds": caption_embeds, "image_features": image_features}
        if input_ids is not None and self._is_sequence(input_ids, labels, past_key_values):
            if inputs_embeds is not None or conditioning is not None or image_indices is not None:
                raise ValueError("pass image tokens as input_ids, not as inputs_embeds or with conditioning")
            sequence, positions, caption_embeds = self._read_sequence(
                input_ids, attention_mask, position_ids, past_key_values, images
            )
            use_cache = bool(use_cache) or (use_cache is None and past_key_values is not None)
            output = self._score_sequence(
                *(sequence, positions | recorded, labels, logits_to_keep, return_logits, num_items_in_batch),
                {CACHE: past_key_values, "use_cache": use_cache},
            )
            output.caption_embeds = caption_embeds
            return output
        unused = {"position_ids": position_ids, "past_key_values": past_key_values}
        unused["logits_to_keep"] = None if isinstance(logits_to_keep, int) and not logits_to_keep else logits_to_keep
        if wrong := [name for name, value in unused.items() if value is not None]:
            raise TypeError(
                f"{wrong[0]!r} belongs to input_ids with image tokens, and has no effect here; leave it out"
            )
        sequence, mask, caption_embeds = self.get_prefix(
            *(pixel_values, caption_embeds, input_ids, attention_mask, inputs_embeds, image_features),
            *(conditioning, image_indices),
        )
        image_tokens: Any = conditioning if caption_embeds is None else caption_embeds
        with_text = sequence.shape[1] > image_tokens.shape[1]
        start = sequence.shape[1] - 1  # the position that predicts the first label
        length = 1
        if labels is not None:
            if labels.ndim != 2 or len(labels) != len(sequence):
                raise ValueError(f"labels must be ({len(sequence)}, length), got {tuple(labels.shape)}")
            refuse_labels_of_the_prefix(labels, input_ids, attention_mask)
            length = labels.shape[1]
            label_embeds = self.get_input_embeddings()(labels.clamp(min=0)).to(sequence)  # (B, L, d_lm)
            sequence = torch.cat([sequence, label_embeds], dim=1)
            mask = torch.cat([mask, (labels != -100).to(mask)], dim=1)
        positions = {}
        if with_text:  # otherwise no padding precedes a word
            positions = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}

        with_logits = full_logits or labels is None or (not self.training if return_logits is None else return_logits)
        keep: Any = 0 if full_logits else sequence.shape[1] - start  # the last so many positions; 0 keeps all
        if labels is not None and not with_logits:
            keep = F.pad(labels != -100, (start, 1))  # (B, Q + P + L) bool: the positions that predict a label
        output = self.language_model(
            inputs_embeds=sequence,
            use_cache=bool(use_cache),
            logits_to_keep=keep,
            return_dict=True,
            **positions,
            **recorded,
        )
        logits = output.logits  # (B, positions, vocab), or with a mask (number of labels, vocab)
        require_kept(
            (logits.shape[1] == (keep or sequence.shape[1])) if with_logits else logits.ndim == 2, self.language_model
        )
        if not full_logits and with_logits:
            logits = logits[:, :length]

        loss: torch.Tensor | None = None
        if labels is not None:
            counted = labels != -100  # (B, L)
            predictions = logits  # (number of labels, vocab)
            if with_logits:
                predictions = (logits[:, start : start + length] if full_logits else logits)[counted]
            loss = self.loss_function(
                logits=predictions,
                labels=labels[counted],
                vocab_size=predictions.shape[-1],
                num_items_in_batch=num_items_in_batch,
            )
        return VLVCausalLMOutput(
            loss=loss,
            logits=logits if with_logits else None,
            caption_embeds=caption_embeds,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            **{CACHE: getattr(output, CACHE) if use_cache else None},
        )

    def _read_sequence(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        past_key_values: Cache | None,
        images: dict[str, torch.Tensor | None],
    ) -> tuple[torch.Tensor, dict[str, Any], torch.Tensor | None]:
        """Embeddings `(B, L, d_lm)`, the language model's mask and positions, and the images' caption embeddings."""
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        caption_embeds = None
        if any(given is not None for given in images.values()):
            sequence, caption_embeds = self.get_prompt_embeds(input_ids, **images)
        elif past:
            sequence = self.get_input_embeddings()(input_ids)
        elif self._are_image_tokens(input_ids).any():
            raise ValueError("input_ids hold image tokens, but their images are missing; pass pixel_values, too")
        else:
            raise ValueError("an image to caption is missing, and past_key_values are empty; pass pixel_values, too")
        positions = mask_and_positions(sequence, attention_mask, position_ids, past)
        if not past and (mask := positions.get("attention_mask", torch.ones(sequence.shape[:2]))).ndim == 2:
            refuse_long_prefix(self.config, mask, new_tokens=0)
        return sequence, positions, caption_embeds

    def _score_sequence(
        self,
        sequence: torch.Tensor,
        inputs: dict[str, Any],
        labels: torch.Tensor | None,
        logits_to_keep: int | torch.Tensor,
        return_logits: bool | None,
        num_items_in_batch: torch.Tensor | int | None,
        cache: dict[str, Any],
    ) -> VLVCausalLMOutput:
        """The loss and the logits of embeddings `(B, L, d_lm)`, with labels `(B, L)` at the same positions."""
        keep: Any = logits_to_keep
        if labels is not None:
            if labels.shape != sequence.shape[:2]:
                raise ValueError(
                    f"labels are {tuple(labels.shape)}, but input_ids are {tuple(sequence.shape[:2])}; beside image "
                    "tokens, labels are as long as input_ids, with -100 at what is not learnt"
                )
            if not isinstance(keep, int) or keep:
                raise ValueError("labels need the logits of all positions; leave logits_to_keep out")
            labels = labels.masked_fill(self._are_image_tokens(labels), -100)
            labels = F.pad(labels[:, 1:], (0, 1), value=-100)  # (B, L): what each position predicts
            if return_logits is False:
                keep = labels != -100
        output = self.language_model(inputs_embeds=sequence, logits_to_keep=keep, return_dict=True, **inputs, **cache)
        logits = output.logits  # (B, positions, vocab), or with a mask (number of labels, vocab)
        loss: torch.Tensor | None = None
        if labels is not None:
            counted = labels != -100
            require_kept(logits.ndim == (2 if return_logits is False else 3), self.language_model)
            predictions = logits[counted] if logits.ndim == 3 else logits
            loss = self.loss_function(
                logits=predictions,
                labels=labels[counted],
                vocab_size=predictions.shape[-1],
                num_items_in_batch=num_items_in_batch,
            )
        return VLVCausalLMOutput(
            loss=loss,
            logits=None if labels is not None and return_logits is False else logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            **{CACHE: getattr(output, CACHE) if cache["use_cache"] else None},
        )

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.Tensor | None = None,
        caption_embeds: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        prefix_dtype: torch.dtype | None = None,
        inputs: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        conditioning: torch.Tensor | None = None,
        **kwargs,
    ):
        """Writes captions. Takes what the language model's own `generate` takes, unless it cannot follow a prefix.

        Greedy search, beams, sampling, `max_new_tokens`, `min_new_tokens`, `num_return_sequences`, stopping criteria,
        a streamer (for one image), `cache_implementation="static"`. Keyword arguments override `generation_config`,
        which overrides the model's own. The beams and samples of an image share its prefix, which is read once.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, height, width)`): Images. Or give `caption_embeds`.
            caption_embeds (`torch.Tensor` of shape `(B, Q, d_text)`): Caption embeddings that exist already.
            input_ids (`torch.Tensor` of shape `(B, P)`, *optional*):
                An instruction that the model was trained to follow, or words that the caption continues. Or `(B, L)`
                words with image tokens among them, as in `forward`; then `max_length` and `min_length` count them.
            prefix_dtype (`torch.dtype`, *optional*):
                Rounds the prefix to this precision first. The authors' code rounds to bfloat16 whatever the precision
                of the model, which can change the result of beam search.
            inputs (`torch.Tensor`): Another name of `pixel_values` or, of two dimensions, of `input_ids`.
            image_features (`torch.Tensor` of shape `(B, P, d_model)`), mm_token_type_ids: As in `forward`.
            conditioning (`torch.Tensor` of shape `(B, Q, d_cond)`): As in `forward`. In place of images.

        Returns:
            `(B * num_return_sequences, length)` new token ids, without the prefix. After `input_ids` with image tokens
            these come first, and the new ones follow.

        Raises:
            ValueError: For `assistant_model`, `prompt_lookup_num_tokens`, `guidance_scale`, `max_length`, `min_length`
                and `inputs_embeds`. The message names the argument to use instead.
        """
        if inputs is not None:
            if (input_ids if inputs.ndim == 2 else pixel_values) is not None:
                name = "input_ids" if inputs.ndim == 2 else "pixel_values"
                raise ValueError(f"inputs of {inputs.ndim} dimensions are another name of {name}; pass one of them")
            input_ids, pixel_values = (inputs, pixel_values) if inputs.ndim == 2 else (input_ids, inputs)
        images = {"pixel_values": pixel_values, "caption_embeds": caption_embeds, "image_features": image_features}
        explicit = {} if generation_config is None else generation_config.to_diff_dict()
        prompt: torch.Tensor | None = None
        if input_ids is not None and self._are_image_tokens(input_ids).any():
            if conditioning is not None:
                raise ValueError("image tokens in input_ids stand for images; leave conditioning out")
            prompt = input_ids
            mask = torch.ones_like(prompt) if attention_mask is None else attention_mask
            sequence, _, _ = self._read_sequence(prompt, mask, None, None, images)
            refuse_long_prefix(self.config, mask)
            prefix, mask = padding_first(sequence, mask.to(sequence.device))
            kwargs = count_new_tokens(prompt.shape[1], explicit, kwargs)
            if (streamer := kwargs.get("streamer")) is not None:
                kwargs["streamer"] = PromptStreamer(streamer, prompt)
        else:
            images["conditioning"] = conditioning
            prefix, mask, _ = self.get_prefix(input_ids=input_ids, attention_mask=attention_mask, **images)
        check_generation_arguments(explicit)
        check_generation_arguments(kwargs)
        if prefix_dtype is not None:
            prefix = prefix.to(prefix_dtype)
        settings, not_settings = merge_settings(self.generation_config, generation_config, kwargs)
        not_settings |= caption_cache(self.language_model, prefix, mask, settings, not_settings)
        result = self.language_model.generate(
            inputs_embeds=prefix, attention_mask=mask, generation_config=settings, **not_settings
        )
        return result if prompt is None else after_prompt(prompt, result)


__all__ = ["VLVForConditionalGeneration"]
