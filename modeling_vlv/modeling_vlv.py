"""VLV: an image becomes caption embeddings, which a language model turns into words.

One self-contained file (configuration, encoder, captioner), since a Hub repository ships one code file beside a
pipeline component's weights. Shapes in comments: B images, Q queries, d_model the Florence-2 width, d_text the text
encoder's width, d_lm the language model's width.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPTextConfig,
    CLIPTextModel,
    Florence2Config,
    Florence2Model,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.configuration_utils import SubConfigSpec
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

# "Describe with a paragraph what is shown in the image." between <s> and </s>: what Florence-2's processor makes of
# the task token <MORE_DETAILED_CAPTION>, which the authors' code always uses (train/VLV_stage1.py of the original).
FLORENCE_TASK_PROMPT_IDS = [0, 47066, 21700, 19, 10, 17818, 99, 16, 2343, 11, 5, 2274, 4, 2]


class VLVConfig(PreTrainedConfig):
    r"""
    Configuration of [`VLVModel`] and [`VLVForConditionalGeneration`].

    Args:
        encoder_config (`Florence2Config` or `dict`, *optional*):
            The image encoder: Florence-2's vision tower and its sequence-to-sequence transformer.
        text_encoder_config (`CLIPTextConfig` or `dict`, *optional*):
            The frozen text encoder of the text-to-image model. Without `projection_dim` of its own use.
        decoder_config (`PreTrainedConfig` or `dict`, *optional*):
            Any causal language model. None in a stage-1 checkpoint, which reconstructs but does not caption.
        num_queries (`int`, *optional*, defaults to 77):
            Learnable queries, one caption embedding each (VLV paper, table 4: 77 is best). At most the positions of
            the text encoder.
        task_prompt_ids (`list[int]`, *optional*, defaults to `[]`):
            Token ids that follow the image tokens in the encoder, from its own vocabulary. Florence-2's task
            prompt is `FLORENCE_TASK_PROMPT_IDS`.
        attend_all_queries (`bool`, *optional*, defaults to `False`):
            Whether queries attend to each other in both directions. The paper's are causal: a query sees earlier ones.
        query_initializer_range (`float`, *optional*, defaults to 1.0):
            Standard deviation of untrained queries (1.0 in the authors' code).
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of untrained projector weights.

    Raises:
        ValueError: If there are more queries than text encoder positions, or fewer than one.
    """

    model_type = "vlv"
    sub_configs_defaults = {  # noqa: RUF012 (transformers reads it off the class)
        "encoder_config": Florence2Config,
        "text_encoder_config": CLIPTextConfig,
        "decoder_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2", optional=True),
    }

    encoder_config: Any = None
    text_encoder_config: Any = None
    decoder_config: Any = None
    num_queries: int = 77
    task_prompt_ids: list[int] | tuple[int, ...] = ()
    attend_all_queries: bool = False
    query_initializer_range: float = 1.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.task_prompt_ids = list(self.task_prompt_ids)
        positions = self.text_encoder_config.max_position_embeddings
        if not 1 <= self.num_queries <= positions:
            raise ValueError(
                f"num_queries is {self.num_queries}, but the text encoder has {positions} positions; "
                f"choose 1 to {positions}"
            )

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The language model's configuration, or this one in a stage-1 checkpoint."""
        return self if self.decoder_config is None else self.decoder_config


@dataclass
class VLVModelOutput(ModelOutput):
    """
    Args:
        caption_embeds (`torch.Tensor` of shape `(B, Q, d_text)`):
            The caption embeddings `z`: what stands in place of word embeddings in the text encoder.
        conditioning (`torch.Tensor` of shape `(B, Q, d_text)`):
            `T(z)`, the text encoder's last hidden state: what the denoiser and the language model see.
    """

    caption_embeds: torch.Tensor | None = None
    conditioning: torch.Tensor | None = None


@dataclass
class VLVCausalLMOutput(ModelOutput):
    """
    Args:
        loss (`torch.Tensor` of shape `()`, returned when `labels` are given):
            Next-token cross-entropy over the labels that are not -100.
        logits (`torch.Tensor`):
            `(B, L, vocab)` with labels: `logits[:, i]` predicts `labels[:, i]`. `(B, 1, vocab)` without: the next
            token. `(B, Q + P + L, vocab)` with `full_logits=True`. None while training, unless asked for.
        caption_embeds (`torch.Tensor` of shape `(B, Q, d_text)`):
            The caption embeddings that were used.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    caption_embeds: torch.Tensor | None = None


class VLVProjector(nn.Module):
    """Linear, GELU, Linear: the paper's φ (into the text encoder) and ψ (into the language model)."""

    def __init__(self, input_width: int, output_width: int):
        super().__init__()
        self.linear_1 = nn.Linear(input_width, output_width)
        self.linear_2 = nn.Linear(output_width, output_width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.gelu(self.linear_1(hidden_states)))


class VLVPreTrainedModel(PreTrainedModel):
    config_class = VLVConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = [  # noqa: RUF012
        "Florence2VisionBlock",
        "BartEncoderLayer",
        "BartDecoderLayer",
        "CLIPEncoderLayer",
        "CLIPTextEmbeddings",
        "VLVProjector",
    ]
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VLVModel):
            init.normal_(module.query_embeds, mean=0.0, std=self.config.query_initializer_range)

    def train(self, mode: bool = True):
        """Like `torch.nn.Module.train`, but parts of which nothing learns stay in evaluation mode.

        A frozen part with dropout or drop path would give its learning neighbours noise (the authors' code does that).
        """
        super().train(mode)
        if mode:
            has, learns = _rest_frozen_parts(self)
            if has and not learns:
                return super().train(False)
            for layer in self._layers_to_checkpoint():
                layer.training = True
        return self

    def _layers_to_checkpoint(self) -> list[nn.Module]:
        """Frozen layers that gradients pass through, and that gradient checkpointing was asked for.

        transformers checkpoints layers in training mode only. What they hold stays in evaluation mode, and so does a
        layer with a dropout of its own.
        """
        if not self.is_gradient_checkpointing:
            return []
        parts = [module.text_encoder for module in self.modules() if isinstance(module, VLVModel)]
        if isinstance(self, VLVForConditionalGeneration):
            parts.append(self.language_model)
        layers = [layer for part in parts for layer in part.modules() if isinstance(layer, GradientCheckpointingLayer)]
        return [layer for layer in layers if layer.gradient_checkpointing and not _drops_out(layer)]


def _drops_out(layer: nn.Module) -> bool:
    return any(isinstance(value, float) and value > 0 and "drop" in name for name, value in vars(layer).items())


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """As `model.to(dtype)`, but what is computed and not stored, such as rotary frequencies, keeps its precision."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                setattr(module, name, buffer.to(dtype))


def _build(
    model_class: Any, config: VLVConfig, dtype: torch.dtype, parts: dict[str, PreTrainedConfig]
) -> VLVPreTrainedModel:
    """A new model, its parts with the kinds of attention that the models have whose configurations are `parts`."""
    kinds = {name: part._attn_implementation for name, part in parts.items() if part._attn_implementation}
    model = model_class._from_config(config, attn_implementation=kinds)
    _cast(model, dtype)
    return model


def _rest_frozen_parts(module: nn.Module) -> tuple[bool, bool]:
    """Puts what has parameters, but none that learns, in evaluation mode; in one pass, as trainers call it often.

    Returns:
        Whether the module has parameters, and whether any of them learns.
    """
    own = list(module.parameters(recurse=False))
    has, learns = bool(own), any(p.requires_grad for p in own)
    frozen = []
    for child in module.children():
        child_has, child_learns = _rest_frozen_parts(child)
        has, learns = has or child_has, learns or child_learns
        if child_has and not child_learns:
            frozen.append(child)
    if learns:  # else the whole of it is put to rest further up
        for child in frozen:
            child.eval()
    return has, learns


_OF_A_CAPTIONER = r"^language_(model|projector)\."  # weights that a `VLVModel` leaves where it finds them


class VLVModel(VLVPreTrainedModel):
    """Image to caption embeddings: Florence-2, learnable queries, a projector, and the frozen text encoder `T`.

    This is what stage 1 trains and what reconstruction needs. The text encoder is part of it and is stored once, here.
    """

    _keys_to_ignore_on_load_unexpected: Any = [_OF_A_CAPTIONER]  # noqa: RUF012

    def __init__(self, config: VLVConfig):
        super().__init__(config)
        encoder_width = config.encoder_config.text_config.d_model
        text_width = config.text_encoder_config.hidden_size
        self.encoder = Florence2Model._from_config(config.encoder_config)
        self.query_embeds = nn.Parameter(torch.empty(1, config.num_queries, encoder_width))  # (1, Q, d_model)
        self.projector = VLVProjector(encoder_width, text_width)
        self.text_encoder = CLIPTextModel._from_config(config.text_encoder_config)
        self.post_init()
        self.text_encoder.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As `PreTrainedModel.from_pretrained`; the text encoder comes back frozen, as stage 1 demands."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.text_encoder.requires_grad_(False)
        return loaded

    @classmethod
    def from_vision_text_pretrained(
        cls,
        encoder: str,
        text_encoder: str,
        *,
        text_encoder_subfolder: str | None = "text_encoder",
        dtype: torch.dtype = torch.float32,
        encoder_kwargs: dict[str, Any] | None = None,
        text_encoder_kwargs: dict[str, Any] | None = None,
        **config_kwargs,
    ) -> VLVModel:
        """Starts stage 1 from a pretrained Florence-2 and the text encoder of a diffusion model.

        Args:
            encoder (`str`):
                Folder or repo id of a Florence-2 in transformers' format, e.g. `florence-community/Florence-2-large`.
            text_encoder (`str`):
                Folder or repo id of a diffusers pipeline (with `text_encoder_subfolder=None`, of a CLIP text model).
            dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Of all parts, whatever they were stored in:
                what trains in mixed precision needs its weights in full.
            encoder_kwargs, text_encoder_kwargs (`dict`, *optional*):
                Passed to the parts' `from_pretrained`.
            config_kwargs:
                Fields of [`VLVConfig`], such as `num_queries` and `task_prompt_ids`. By default as many queries as the
                text encoder has positions, and Florence-2's task prompt where its vocabulary is Florence-2's.
        """
        vision = Florence2Config.from_pretrained(encoder, **(encoder_kwargs or {})).vision_config
        if hasattr(vision, "dim_embed"):
            raise ValueError(
                f"{encoder} is a Florence-2 of Microsoft's own format; use florence-community/Florence-2-large or "
                "-base, or convert it: vlv convert --florence DIR --output NEW_DIR"
            )
        florence = Florence2Model.from_pretrained(encoder, **(encoder_kwargs or {}))
        text_kwargs = dict(text_encoder_kwargs or {})
        if text_encoder_subfolder:
            text_kwargs["subfolder"] = text_encoder_subfolder
        text_model = CLIPTextModel.from_pretrained(text_encoder, **text_kwargs)
        config_kwargs.setdefault("num_queries", text_model.config.max_position_embeddings)
        if florence.config.text_config.vocab_size > max(FLORENCE_TASK_PROMPT_IDS):
            config_kwargs.setdefault("task_prompt_ids", FLORENCE_TASK_PROMPT_IDS)
        parts = {"encoder_config": florence.config, "text_encoder_config": text_model.config}
        model = _build(cls, VLVConfig(**copy.deepcopy(parts), **config_kwargs), dtype, parts)
        model.encoder.load_state_dict(florence.state_dict())
        model.text_encoder.load_state_dict(text_model.state_dict())
        return model.eval()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_encoder.embeddings.token_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_encoder.embeddings.token_embedding = value

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Projected image tokens `(B, 1 + h * w, d_model)`: their mean first, then the grid."""
        expected = self.config.encoder_config.vision_config.in_channels
        if pixel_values.ndim != 4 or pixel_values.shape[1] != expected:
            raise ValueError(
                f"pixel_values must be (batch, {expected}, height, width), got {tuple(pixel_values.shape)}; "
                "VLVProcessor prepares them from images"
            )
        dtype = self.encoder.multi_modal_projector.image_proj_norm.weight.dtype  # of a norm: never quantised
        return self.encoder.get_image_features(pixel_values.to(dtype=dtype)).pooler_output

    def get_caption_embeds(
        self, pixel_values: torch.Tensor | None = None, image_features: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Caption embeddings `z` of shape `(B, Q, d_text)`, from pixels or from ready image tokens."""
        if image_features is None and pixel_values is None:
            raise ValueError("pass pixel_values or image_features")
        tokens: Any = self.get_image_features(pixel_values) if pixel_values is not None else image_features
        transformer = self.encoder.language_model
        if self.config.task_prompt_ids:
            prompt = torch.tensor([self.config.task_prompt_ids], device=tokens.device)
            words = transformer.shared(prompt).to(tokens.device).expand(len(tokens), -1, -1)
            tokens = torch.cat([tokens, words], dim=1)  # (B, image tokens + prompt, d_model)
        positions = self.config.encoder_config.text_config.max_position_embeddings
        if tokens.shape[1] > positions:
            raise ValueError(
                f"the image (with the task prompt) gives {tokens.shape[1]} tokens, but the encoder has {positions} "
                "positions; make images smaller (the image processor's size, --encoder_image_size in training)"
            )
        memory = transformer.encoder(inputs_embeds=tokens).last_hidden_state
        queries = self.query_embeds.to(memory).expand(len(memory), -1, -1)  # (B, Q, d_model)
        mask: torch.Tensor | None = None
        if self.config.attend_all_queries:
            size = (len(memory), 1, self.config.num_queries, self.config.num_queries)
            mask = memory.new_zeros(size)  # nothing masked: the decoder would be causal by itself
        states = transformer.decoder(
            inputs_embeds=queries, attention_mask=mask, encoder_hidden_states=memory, use_cache=False
        ).last_hidden_state
        return self.projector(states)

    def encode_caption_embeds(self, caption_embeds: torch.Tensor) -> torch.Tensor:
        """`T(z)`: caption embeddings `(B, N, d_text)` through the frozen text encoder, no BOS or EOS added.

        As CLIP does with words: position embeddings added, causal attention, final layer norm.
        """
        text = self.text_encoder
        positions, width = text.config.max_position_embeddings, text.config.hidden_size
        if (
            caption_embeds.ndim != 3
            or caption_embeds.shape[2] != width
            or not 1 <= caption_embeds.shape[1] <= positions
        ):
            raise ValueError(
                f"caption_embeds must be (batch, 1 to {positions}, {width}), got {tuple(caption_embeds.shape)}; "
                "are they from another model?"
            )
        hidden = text.embeddings(inputs_embeds=caption_embeds.to(text.final_layer_norm.weight.dtype))
        mask = create_causal_mask(config=text.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None)
        states = text.encoder(inputs_embeds=hidden, attention_mask=mask, is_causal=True).last_hidden_state
        return text.final_layer_norm(states)

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        caption_embeds: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> VLVModelOutput | tuple:
        """Caption embeddings and their conditioning.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, height, width)`): Images as [`VLVImageProcessor`] gives them.
            caption_embeds (`torch.Tensor` of shape `(B, N, d_text)`): Ready embeddings; then no image is encoded.
            input_ids (`torch.Tensor` of shape `(B, N)`): Real words in the text encoder's vocabulary, for prompts,
                negative prompts and the unconditional context; then there are no caption embeddings.

        Raises:
            ValueError: Unless exactly one of the three is given.
        """
        if sum(given is not None for given in (pixel_values, caption_embeds, input_ids)) != 1:
            raise ValueError("pass either pixel_values or caption_embeds (or input_ids), and not both")
        if input_ids is not None:
            output = VLVModelOutput(conditioning=self.text_encoder(input_ids=input_ids).last_hidden_state)
        else:
            z = self.get_caption_embeds(pixel_values) if caption_embeds is None else caption_embeds
            output = VLVModelOutput(caption_embeds=z, conditioning=self.encode_caption_embeds(z))
        return output if return_dict or return_dict is None else output.to_tuple()


class VLVForConditionalGeneration(VLVPreTrainedModel, GenerationMixin):
    """The captioner: a [`VLVModel`], a projector, and a causal language model that reads the conditioning."""

    def __init__(self, config: VLVConfig):
        if config.decoder_config is None:
            raise ValueError(
                "this is a stage-1 checkpoint: it has no language model, so it reconstructs images but writes no "
                "captions. Load it as VLVModel, or start stage 2 with "
                "VLVForConditionalGeneration.from_encoder_decoder_pretrained(this_checkpoint, a_language_model)"
            )
        super().__init__(config)
        self.model = VLVModel._from_config(config)
        words = config.decoder_config.get_text_config()
        words_width = getattr(words, "word_embed_proj_dim", None) or words.hidden_size  # the first: OPT's
        self.language_projector = VLVProjector(config.text_encoder_config.hidden_size, words_width)
        self.language_model = AutoModelForCausalLM.from_config(config.decoder_config, trust_remote_code=False)
        self.post_init()
        self.model.text_encoder.requires_grad_(False)
        self.generation_config = GenerationConfig.from_model_config(config.decoder_config)
        # Of these VLVModel leaves the language model's, which here would hide weights that have no place.
        patterns: set[str] = cast(Any, self)._keys_to_ignore_on_load_unexpected  # of all parts, gathered by post_init
        patterns.discard(_OF_A_CAPTIONER)
        self.loss_type = None  # no loss that shifts labels, or Trainer would leave the first word out of its count

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As `PreTrainedModel.from_pretrained`; the text encoder comes back frozen."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.model.text_encoder.requires_grad_(False)
        return loaded

    @classmethod
    def from_encoder_decoder_pretrained(
        cls,
        encoder: str | VLVModel,
        decoder: str | PreTrainedModel,
        *,
        dtype: torch.dtype = torch.float32,
        encoder_kwargs: dict[str, Any] | None = None,
        decoder_kwargs: dict[str, Any] | None = None,
    ) -> VLVForConditionalGeneration:
        """Starts stage 2 from a stage-1 checkpoint and a pretrained causal language model; the projector is new.

        Args:
            encoder (`str` or `VLVModel`): Folder, repo id, or a loaded model.
            decoder (`str` or `PreTrainedModel`): Folder or repo id of a causal LM, e.g. `Qwen/Qwen2.5-3B`, or a model.
            dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Of all parts, whatever they were stored in:
                what trains in mixed precision needs its weights in full.
        """
        vlv = VLVModel.from_pretrained(encoder, **(encoder_kwargs or {})) if isinstance(encoder, str) else encoder
        if isinstance(decoder, str):
            decoder = AutoModelForCausalLM.from_pretrained(decoder, **(decoder_kwargs or {}))
        fields = {name: copy.deepcopy(getattr(vlv.config, name)) for name in _SHARED_FIELDS}
        parts = {name: getattr(vlv.config, name) for name in ("encoder_config", "text_encoder_config")}
        parts["decoder_config"] = decoder.config
        config = VLVConfig(decoder_config=copy.deepcopy(decoder.config), **fields)
        model = _build(cls, config, dtype, parts)
        model.model.load_state_dict(vlv.state_dict())
        model.language_model.load_state_dict(decoder.state_dict())
        if decoder.generation_config is not None:
            model.generation_config = GenerationConfig.from_dict(decoder.generation_config.to_dict())
        return model.eval()

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

    def get_prefix(
        self,
        pixel_values: torch.Tensor | None = None,
        caption_embeds: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the language model reads before the caption: projected conditioning, then an optional text prefix.

        Returns:
            Embeddings `(B, Q + P, d_lm)`, their mask `(B, Q + P)`, and the caption embeddings `(B, Q, d_text)`.
            Padding of a text prefix stands before everything else.
        """
        output = self.model(pixel_values=pixel_values, caption_embeds=caption_embeds)
        embeds = self.get_input_embeddings()
        prefix = self.language_projector(output.conditioning.to(self.language_projector.linear_1.bias.dtype))
        prefix = prefix.to(embeds.weight.dtype)  # (B, Q, d_lm)
        mask = torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device)
        if input_ids is not None and input_ids.shape[1]:
            if len(input_ids) != len(prefix):
                raise ValueError(f"{len(input_ids)} rows of input_ids for {len(prefix)} images; give one row an image")
            if attention_mask is None:
                attention_mask = torch.ones_like(input_ids)
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"attention_mask is {tuple(attention_mask.shape)}, but input_ids are {tuple(input_ids.shape)}"
                )
            words = embeds(input_ids).to(prefix)  # (B, P, d_lm)
            prefix = torch.cat([prefix, words], dim=1)
            mask = torch.cat([mask, attention_mask.to(mask)], dim=1)
            # Padding goes to the front, wherever it was: the last place must be what the caption follows.
            order = (mask != 0).long().argsort(dim=1, stable=True)  # (B, Q + P)
            prefix = prefix.gather(1, order[..., None].expand_as(prefix))
            mask = mask.gather(1, order)
        return prefix, mask, output.caption_embeds

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
        return_dict: bool | None = None,
        **kwargs,
    ) -> VLVCausalLMOutput | tuple:
        """Next-token loss and logits of captions, given their images.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, height, width)`): Images; or give `caption_embeds`.
            caption_embeds (`torch.Tensor` of shape `(B, Q, d_text)`): Ready caption embeddings.
            input_ids (`torch.Tensor` of shape `(B, P)`, *optional*): A text prefix, also of length 0; no loss on it.
            attention_mask (`torch.Tensor` of shape `(B, P)`, *optional*): Of the text prefix, padded on either side.
            labels (`torch.Tensor` of shape `(B, L)`, *optional*): The caption alone, its EOS included, padded on the
                right with -100.
            return_logits (`bool`, *optional*): By default logits are returned except while training with labels, when
                they are computed only where there is a label.
            full_logits (`bool`, *optional*, defaults to `False`): Logits of every position, prefix included.
            num_items_in_batch (`int`, *optional*): What the summed loss is divided by, under gradient accumulation.
        """
        prefix, mask, caption_embeds = self.get_prefix(pixel_values, caption_embeds, input_ids, attention_mask)
        sequence = prefix
        if labels is not None:
            if labels.ndim != 2 or len(labels) != len(prefix):
                raise ValueError(f"labels must be ({len(prefix)}, length), got {tuple(labels.shape)}")
            words = self.get_input_embeddings()(labels.clamp(min=0)).to(prefix)  # (B, L, d_lm)
            sequence = torch.cat([prefix, words], dim=1)
            mask = torch.cat([mask, (labels != -100).to(mask)], dim=1)
        places: dict[str, Any] = {}
        if input_ids is not None and input_ids.shape[1]:  # else no padding stands before a word, and none is needed
            places = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        start = prefix.shape[1] - 1  # this position predicts the first word
        length = 1 if labels is None else labels.shape[1]
        keep_logits = full_logits or labels is None or (not self.training if return_logits is None else return_logits)
        counted: Any = None if labels is None else labels != -100  # (B, L)
        logits: torch.Tensor | None = None
        if self.config.decoder_config.model_type in _PLAIN_HEADS and not keep_logits:
            states = self.language_model.get_decoder()(
                inputs_embeds=sequence, use_cache=False, **places
            ).last_hidden_state  # (B, Q + P + L, d_lm)
            predicted = self.get_output_embeddings()(states[:, start : start + length][counted])
        else:
            wanted = 0 if full_logits else sequence.shape[1] - start  # the last so many; 0 is all
            if "logits_to_keep" in inspect.signature(self.language_model.forward).parameters:
                places["logits_to_keep"] = wanted
            logits = self.language_model(inputs_embeds=sequence, use_cache=False, **places).logits
            first = 0 if full_logits else logits.shape[1] - wanted
            logits = logits[:, first:] if full_logits else logits[:, first : first + length]
            if labels is not None:
                predicted = (logits[:, start : start + length] if full_logits else logits)[counted]
        loss: torch.Tensor | None = None
        if labels is not None:
            total = F.cross_entropy(predicted.float(), labels[counted].to(predicted.device), reduction="sum")
            loss = total / (counted.sum() if num_items_in_batch is None else num_items_in_batch)
        logits = logits if keep_logits else None
        output = VLVCausalLMOutput(loss=loss, logits=logits, caption_embeds=caption_embeds)
        return output if return_dict or return_dict is None else output.to_tuple()

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.Tensor | None = None,
        caption_embeds: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        prefix_dtype: torch.dtype | None = None,
        **kwargs,
    ):
        """Writes captions; takes what the language model's own `generate` takes, except what cannot follow a prefix.

        Greedy, beams, sampling, `max_new_tokens`, `min_new_tokens`, `num_return_sequences`, stopping criteria, a
        streamer (for one image), `cache_implementation="static"`. Settings come from `generation_config` or from the
        model's own, then from keyword arguments.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, height, width)`): Images; or give `caption_embeds`.
            caption_embeds (`torch.Tensor` of shape `(B, Q, d_text)`): Ready caption embeddings.
            input_ids (`torch.Tensor` of shape `(B, P)`, *optional*): Words that the caption goes on from.
            prefix_dtype (`torch.dtype`, *optional*): Rounds the prefix to this precision first. The authors' code
                rounds to bfloat16 whatever the model's precision, which can change what beam search finds.

        Returns:
            `(B * num_return_sequences, length)` new token ids: neither prefix is repeated in them.

        Raises:
            ValueError: For `assistant_model`, `prompt_lookup_num_tokens`, `guidance_scale`, `max_length`, `min_length`
                and `inputs_embeds`, with the argument to use instead.
        """
        _check_generation_arguments(kwargs)
        if generation_config is not None:
            _check_generation_arguments(generation_config.to_diff_dict())
        prefix, mask, _ = self.get_prefix(pixel_values, caption_embeds, input_ids, attention_mask)
        prefix = prefix if prefix_dtype is None else prefix.to(prefix_dtype)
        settings = copy.deepcopy(generation_config or self.generation_config)
        for name in (
            "max_length",
            "min_length",
        ):  # a language model's own; passed, they are refused above
            setattr(settings, name, None)
        own = {name: value for name, value in self.generation_config.to_dict().items() if value is not None}
        own = {name: value for name, value in own.items() if name not in ("max_length", "min_length")}
        settings.update(**own, defaults_only=True)  # what was passed goes before the model's own
        others = settings.update(**kwargs)  # what is no setting: a streamer, stopping criteria, ...
        return self.language_model.generate(
            inputs_embeds=prefix, attention_mask=mask, generation_config=settings, **others
        )


_SHARED_FIELDS = (
    "encoder_config",
    "text_encoder_config",
    "num_queries",
    "task_prompt_ids",
    "attend_all_queries",
    "query_initializer_range",
    "initializer_range",
)
_PLAIN_HEADS = ("gpt2", "gpt_neox", "llama", "mistral", "opt", "phi3", "qwen2", "qwen3", "smollm3")
"""Language models whose logits are their output embeddings' and nothing else: in training these are computed only
where there is a label. All others' own `forward` computes them, since many scale or cap them (Gemma, Granite)."""
_REFUSED_GENERATION_ARGUMENTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "assistant_model": (lambda v: v is not None, "an assistant cannot read the image prefix; leave it out"),
    "prompt_lookup_num_tokens": (lambda v: v is not None, "the prefix is no text to look up in; leave it out"),
    "guidance_scale": (
        lambda v: v not in (None, 1, 1.0),
        "there is no unconditional prefix for the language model; leave it out "
        "(guidance belongs to VLVReconstructionPipeline)",
    ),
    "max_length": (lambda v: v is not None, "the prefix has no words to count; use max_new_tokens"),
    "min_length": (lambda v: v not in (None, 0), "the prefix has no words to count; use min_new_tokens"),
    "prefill_chunk_size": (lambda v: v is not None, "the prefix has no words to cut; leave it out"),
    "inputs_embeds": (lambda v: v is not None, "pass pixel_values or caption_embeds, and words as input_ids"),
}


def _check_generation_arguments(arguments: dict[str, Any]) -> None:
    for name, (is_set, advice) in _REFUSED_GENERATION_ARGUMENTS.items():
        if name in arguments and is_set(arguments[name]):
            raise ValueError(f"{name} does not work with VLV's generate: {advice}")


__all__ = ["VLVConfig", "VLVForConditionalGeneration", "VLVModel", "VLVModelOutput", "VLVPreTrainedModel"]
