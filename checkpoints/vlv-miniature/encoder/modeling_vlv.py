"""VLV's configuration and encoder: an image becomes caption embeddings, and the text encoder conditions on them.

The file is self-contained, because diffusers downloads one code file beside a pipeline component's weights. The
captioner is in `modeling_vlv_captioner.py`.

Shapes in comments: B images, Q query tokens, d_model the width of image and query tokens, d_text the width of a
caption embedding (of the text encoder, or of several together), d_cond the width of the conditioning.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    BartConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Florence2Config,
    Florence2Model,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.configuration_utils import SubConfigSpec
from transformers.conversion_mapping import WeightRenaming, register_checkpoint_conversion_mapping
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.bart.modeling_bart import BartDecoder
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer
from transformers.models.florence2.modeling_florence2 import Florence2MultiModalProjector
from transformers.utils import ModelOutput, cached_file, can_return_tuple, logging
from transformers.utils.output_capturing import capture_outputs

# Florence-2's processor replaces the task token <MORE_DETAILED_CAPTION> by "Describe with a paragraph what is shown in
# the image.", here between <s> and </s>. The authors' code always uses it (train/VLV_stage1.py of the original).
FLORENCE_TASK_PROMPT_IDS = [0, 47066, 21700, 19, 10, 17818, 99, 16, 2343, 11, 5, 2274, 4, 2]

QUERY_DECODER: dict[str, Any] = {
    **{"d_model": 768, "decoder_layers": 6, "decoder_attention_heads": 12, "decoder_ffn_dim": 3072, "dropout": 0.1},
    # Of BART's configuration, what the decoder does not use: words, and the encoder's layers.
    **{"vocab_size": 1, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None},
    **{"decoder_start_token_id": None, "forced_eos_token_id": None, "encoder_layers": 0},
}
"""The query decoder of a vision backbone by default: the shape of Florence-2-base's decoder."""
MAX_PATCHES_PER_SIDE = 128
"""Of a vision backbone's images: rows and columns that have a position embedding."""

MODEL_CODE = ("modeling_vlv", "modeling_vlv_captioner", "generation_vlv")  # the captioner imports both others
RENAMED_CONFIG_FIELDS = {  # field names of version 0.1 and the names that replace them
    "encoder_config": "image_encoder_config",
    "decoder_config": "text_config",
    "num_queries": "num_query_tokens",
}


class VLVConfig(PreTrainedConfig):
    r"""
    Configuration of [`VLVModel`] and [`VLVForConditionalGeneration`].

    Args:
        image_encoder_config (`PreTrainedConfig` or `dict`, *optional*, defaults to `Florence2Config`):
            The image encoder: the vision tower and the sequence-to-sequence transformer of Florence-2, or any vision
            model of `AutoModel` that gives features of patches (SigLIP, CLIP, DINOv2, DINOv3, ViT, ConvNeXt, ...). Of
            a model of images and text, such as CLIP, the vision part is taken.
        query_decoder_config (`BartConfig` or `dict`, *optional*):
            For an image encoder other than Florence-2: the decoder in which query tokens attend to each other and to
            the image. Fields that a `dict` lacks are those of `QUERY_DECODER`.
        text_encoder_config, text_encoder_2_config, text_encoder_3_config (`PreTrainedConfig` or `dict`, *optional*):
            The frozen text encoders of the text-to-image model, by the names that diffusers gives them: one CLIP text
            model, as in Stable Diffusion, or up to three models of any kind that take `inputs_embeds`. A caption
            embedding consists of one part for each of them.
        conditioning_layers (`list[list[int]]`, *optional*, defaults to `[-1]` for each text encoder):
            For each text encoder the hidden states that condition the denoiser: 0 for its input embeddings, `n` for
            the output of its layer `n`, or counted from the end. The last one is taken after the final norm. They
            stand side by side in the conditioning.
        pooled_conditioning (`list[int]`, *optional*, defaults to `[]`):
            The text encoders, numbered from 0, whose projected final state conditions the denoiser, too. They are
            `CLIPTextModelWithProjection`.
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            The language model: any causal language model of transformers. None in a stage-1 checkpoint, which
            reconstructs images but does not caption them.
        num_query_tokens (`int`, *optional*, defaults to 77):
            Number of learnable query tokens. Each yields one caption embedding (VLV paper, table 4: 77 is best). At
            most the number of positions of the text encoder.
        task_prompt_ids (`list[int]`, *optional*, defaults to `[]`):
            Token ids, in the image encoder's vocabulary, that follow the image tokens. `FLORENCE_TASK_PROMPT_IDS`
            is Florence-2's own task prompt. Other image encoders have no words.
        attend_all_queries (`bool`, *optional*, defaults to `False`):
            Whether query tokens attend to each other in both directions. The paper's attention is causal.
        query_initializer_range (`float`, *optional*, defaults to 1.0):
            Standard deviation of untrained query tokens (1.0 in the authors' code).
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of untrained projector weights.
        instructions (`list[str]`, *optional*):
            What the captioner was trained to follow as a text prefix, such as "briefly", for programs that offer it.
        image_token_id (`int`, *optional*): The token in the captioner's `input_ids` that a caption embedding replaces.

    Raises:
        ValueError: If `num_query_tokens` is below 1 or above the number of positions of a text encoder, if
            `conditioning_layers` or `pooled_conditioning` do not fit the text encoders, if `query_decoder_config` or
            `task_prompt_ids` do not fit the image encoder, or if a field has a name of version 0.1.
    """

    model_type = "vlv"
    sub_configs_defaults = {  # noqa: RUF012 (transformers reads it from the class)
        "image_encoder_config": SubConfigSpec(config_class=AutoConfig, model_type="florence2"),
        "query_decoder_config": SubConfigSpec(config_class=BartConfig, optional=True),
        "text_encoder_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_text_model"),
        "text_encoder_2_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_text_model", optional=True),
        "text_encoder_3_config": SubConfigSpec(config_class=AutoConfig, model_type="t5", optional=True),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2", optional=True),
    }

    image_encoder_config: Any = None
    query_decoder_config: Any = None
    text_encoder_config: Any = None
    text_encoder_2_config: Any = None
    text_encoder_3_config: Any = None
    conditioning_layers: list[list[int]] | None = None
    pooled_conditioning: list[int] | tuple[int, ...] = ()
    text_config: Any = None
    num_query_tokens: int = 77
    task_prompt_ids: list[int] | tuple[int, ...] = ()
    attend_all_queries: bool = False
    query_initializer_range: float = 1.0
    initializer_range: float = 0.02
    instructions: list[str] | None = None
    image_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        _unregister(cls)

    def __post_init__(self, **kwargs):
        refuse_renamed_fields(kwargs)
        if isinstance(self.query_decoder_config, dict):
            default = QUERY_DECODER | {"max_position_embeddings": self.num_query_tokens}
            self.query_decoder_config = default | self.query_decoder_config
        super().__post_init__(**kwargs)
        self.task_prompt_ids = list(self.task_prompt_ids)
        self._complete_image_encoder()
        encoders = self.text_encoder_configs
        if self.conditioning_layers is None:
            self.conditioning_layers = [[-1] for _ in encoders]
        if len(self.conditioning_layers) != len(encoders) or not all(self.conditioning_layers):
            raise ValueError(
                f"conditioning_layers is {self.conditioning_layers}; expected a list of layers for each of the "
                f"{len(encoders)} text encoders"
            )
        for number, (layers, encoder) in enumerate(zip(self.conditioning_layers, encoders, strict=True)):
            depth = encoder.num_hidden_layers
            if not all(-depth - 1 <= layer <= depth for layer in layers):
                raise ValueError(
                    f"conditioning_layers[{number}] is {layers}, but that text encoder has {depth} layers; choose "
                    f"{-depth - 1} to {depth}"
                )
        self.pooled_conditioning = list(self.pooled_conditioning)
        for number in self.pooled_conditioning:
            if number not in range(len(encoders)) or encoders[number].model_type != "clip_text_model":
                raise ValueError(
                    f"pooled_conditioning is {self.pooled_conditioning}; expected numbers of CLIP text models, from 0"
                )
        positions = self.num_text_positions
        if not 1 <= self.num_query_tokens <= positions:
            raise ValueError(
                f"num_query_tokens is {self.num_query_tokens}, but the text encoder has {positions} positions; "
                f"choose 1 to {positions}"
            )

    def _complete_image_encoder(self) -> None:
        """Takes the vision part of a model of images and text, and sets the default query decoder."""
        if isinstance(self.image_encoder_config, Florence2Config):
            if self.query_decoder_config is not None:
                raise ValueError("query_decoder_config is set, but Florence-2 has a decoder of its own; leave it out")
            return
        self.image_encoder_config = vision_part(self.image_encoder_config)
        if self.query_decoder_config is None:
            self.query_decoder_config = BartConfig(**QUERY_DECODER, max_position_embeddings=self.num_query_tokens)
        if self.task_prompt_ids:
            raise ValueError(
                f"task_prompt_ids is {self.task_prompt_ids}, but the image encoder is a "
                f"{self.image_encoder_config.model_type!r}, which reads no words; leave it out"
            )
        positions = self.query_decoder_config.max_position_embeddings
        if positions < self.num_query_tokens:
            raise ValueError(
                f"num_query_tokens is {self.num_query_tokens}, but query_decoder_config has {positions} positions "
                "(max_position_embeddings)"
            )

    @property
    def query_token_dim(self) -> int:
        """Width of query tokens and image tokens."""
        return (self.query_decoder_config or self.image_encoder_config.text_config).d_model

    @property
    def text_encoder_configs(self) -> list[PreTrainedConfig]:
        """The configurations of the text encoders, in order."""
        configs = (self.text_encoder_config, self.text_encoder_2_config, self.text_encoder_3_config)
        return [config for config in configs if config is not None]

    @property
    def num_text_positions(self) -> int:
        """The largest number of caption embeddings that every text encoder takes; 512 where none has a limit (T5)."""
        return min(getattr(config, "max_position_embeddings", None) or 512 for config in self.text_encoder_configs)

    @property
    def caption_embed_dim(self) -> int:
        """Width of a caption embedding: the sum of the widths of the text encoders."""
        return sum(config.hidden_size for config in self.text_encoder_configs)

    @property
    def conditioning_dim(self) -> int:
        """Width of the conditioning, which language model and denoiser read."""
        assert self.conditioning_layers is not None
        pairs = zip(self.text_encoder_configs, self.conditioning_layers, strict=True)
        return sum(config.hidden_size * len(layers) for config, layers in pairs)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs) -> None:
        """Writes the configuration, and the code that it names, into a folder or a Hub repository. A pipeline whose
        code is not found is left out of the configuration, unless it lies in a Hub repository."""
        folder = Path(save_directory)
        auto_map = getattr(self, "auto_map", None) or {}
        for name, reference in auto_map.items():
            local = reference.rpartition("--")[2] if isinstance(reference, str) else ""
            module, _, class_name = local.partition(".")
            if (module, class_name) == ("modeling_vlv", "VLVForConditionalGeneration"):  # its place in version 0.2.0
                module, local = "modeling_vlv_captioner", f"modeling_vlv_captioner.{class_name}"
            codes = {"modeling_vlv": MODEL_CODE[:1], "modeling_vlv_captioner": MODEL_CODE}.get(module, ())
            sources: list[Any] = [_find_code(code, self.name_or_path) for code in codes]
            if sources and all(sources):
                auto_map[name] = local
                for source in sources:
                    _copy(source, folder)
        pipelines = {}
        for task, pipeline in (getattr(self, "custom_pipelines", None) or {}).items():
            repository, _, local = pipeline["impl"].rpartition("--")
            if source := _find_code(local.partition(".")[0], self.name_or_path):
                _copy(source, folder)
                pipelines[task] = {**pipeline, "impl": local}
            elif repository:
                pipelines[task] = pipeline
        if pipelines:
            self.custom_pipelines = pipelines
        elif hasattr(self, "custom_pipelines"):
            del self.custom_pipelines
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def _find_code(module: str, origin: str) -> Path | None:
    """The file of a module: beside this file, in the installed package, or in `origin`, a folder or cached repo."""
    if not module.isidentifier():
        return None
    here, name = Path(__file__).parent, f"{module}.py"
    for path in (here / name, here / "pipelines" / name):
        if path.is_file():
            return path
    try:
        found = cached_file(origin, name, local_files_only=True, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):  # no such folder or repository
        return None
    return Path(found) if found else None


def _copy(source: Path, folder: Path) -> None:
    target = folder / source.name
    if not (target.exists() and target.samefile(source)):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def _unregister(subclass: Any) -> None:
    """Keeps a subclass in a user's module from being saved as remote code, unless the user registers it, too."""
    if "_auto_class" not in vars(subclass):
        subclass._auto_class = None


def refuse_renamed_fields(fields: dict[str, Any], source: str = "the configuration") -> None:
    """Raises `ValueError` for a configuration field with a name of version 0.1; the message gives the new name."""
    for old, new in RENAMED_CONFIG_FIELDS.items():
        if old in fields:
            raise ValueError(
                f"{source} has a field {old!r}, which is called {new!r} since version 0.2. Weights were renamed, too: "
                "export or convert the model again with this version"
            )


@dataclass
class VLVModelOutput(ModelOutput):
    """
    Args:
        caption_embeds (`torch.Tensor` of shape `(B, Q, d_text)`):
            The caption embeddings `z`, which take the place of word embeddings in the text encoder.
        conditioning (`torch.Tensor` of shape `(B, Q, d_cond)`):
            `T(z)`, the hidden states of the text encoder that condition the denoiser: the last one in Stable
            Diffusion, with `d_cond = d_text`; those of several text encoders side by side. Denoiser and language model
            read it.
        pooled_conditioning (`torch.Tensor` of shape `(B, d_pooled)`, returned where the configuration asks for it):
            The projected final state of the last position (of words, of their EOS), of one or more text encoders.
        hidden_states (`tuple[torch.Tensor]`, returned with `output_hidden_states=True`):
            Of a CLIP text encoder: its embeddings and the output of each layer, before the final layer norm, each
            `(B, Q, d_text)`; of several, one after the other.
        attentions (`tuple[torch.Tensor]`, returned with `output_attentions=True`):
            Attention weights of each layer of the text encoder, `(B, heads, Q, Q)`.
    """

    caption_embeds: torch.Tensor | None = None
    conditioning: torch.Tensor | None = None
    pooled_conditioning: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class VLVProjector(nn.Module):
    """Linear, GELU, Linear: the paper's φ (into the text encoder) and ψ (into the language model)."""

    def __init__(self, input_width: int, output_width: int):
        super().__init__()
        self.linear_1 = nn.Linear(input_width, output_width)
        self.linear_2 = nn.Linear(output_width, output_width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.gelu(self.linear_1(hidden_states)))


class VLVImageProjection(Florence2MultiModalProjector):
    """Features of patches `(B, channels, h, w)` to image tokens `(B, 1 + h * w, d_model)`, their mean first.

    It is Florence-2's, with learned embeddings of rows and columns, after a norm, because backbones differ in scale.
    """

    def __init__(self, input_width: int, output_width: int):
        vision = {"embed_dim": [input_width], "projection_dim": output_width}
        vision["max_position_embeddings"] = MAX_PATCHES_PER_SIDE
        super().__init__(Florence2Config(vision_config=vision, text_config=BartConfig()))
        self.patch_norm = nn.LayerNorm(input_width)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        h, w = image_features.shape[2:]
        if max(h, w) > MAX_PATCHES_PER_SIDE:
            raise ValueError(
                f"the image has {h} x {w} patches, but at most {MAX_PATCHES_PER_SIDE} a side have a position; make "
                "images smaller (the image processor's size, --encoder_image_size in training)"
            )
        return super().forward(self.patch_norm(image_features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def vision_part(config: PreTrainedConfig) -> Any:
    """The configuration of a vision backbone: `config` itself, or its vision part.

    Raises:
        ValueError: If the model does not read images alone, or its last hidden state is not of patches.
    """
    config = getattr(config, "vision_config", None) or config
    name = getattr(config, "model_type", type(config).__name__)
    wanted = "expected a vision backbone of transformers' AutoModel, such as SigLIP, CLIP, DINOv2, DINOv3 or ViT"
    if type(config) not in AutoModel._model_mapping:
        raise ValueError(f"image_encoder_config has the model type {name!r}, which AutoModel does not know; {wanted}")
    model_class: Any = AutoModel._model_mapping[type(config)]
    if getattr(model_class, "main_input_name", "") != "pixel_values":
        raise ValueError(f"image_encoder_config has the model type {name!r}, which does not read images; {wanted}")
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "num_queries", None):
        raise ValueError(
            f"image_encoder_config has the model type {name!r}, whose last hidden state is not of patches; {wanted}"
        )
    parameters = inspect.signature(model_class.forward).parameters
    needed = [name for name, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if needed := [name for name in needed if name not in ("self", "pixel_values")]:
        raise ValueError(
            f"image_encoder_config has the model type {name!r}, which needs {' and '.join(needed)} beside pixel values"
            f"; {wanted} (of SigLIP 2 one of a fixed size, such as google/siglip2-base-patch16-256)"
        )
    return config


def _patch_features(backbone: Any, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
    """A vision backbone's output, with its last hidden state as `(B, channels, h, w)`.

    Class and register tokens, which come before the patches, are left out.
    """
    config, (height, width) = backbone.config, pixel_values.shape[2:]
    is_own = _pair(getattr(config, "image_size", None)) == (height, width)
    if not is_own and "interpolate_pos_encoding" in inspect.signature(backbone.forward).parameters:
        kwargs["interpolate_pos_encoding"] = True
    output = backbone(pixel_values, **kwargs)
    states = output.last_hidden_state
    if states.ndim == 3:
        patch = _pair(getattr(config, "patch_size", None) or 4)
        reduction = 2 ** (len(getattr(config, "depths", None) or [0]) - 1)  # of hierarchical models, such as Swin
        h, w = height // (patch[0] * reduction), width // (patch[1] * reduction)
        others = states.shape[1] - h * w
        if others not in (0, 1, 1 + (getattr(config, "num_register_tokens", 0) or 0)):
            raise ValueError(
                f"{type(backbone).__name__} gives {states.shape[1]} tokens for {height} x {width} pixels; expected "
                f"{h} x {w} patches, and at most a class token and register tokens before them"
            )
        states = states[:, others:].transpose(1, 2).unflatten(2, (h, w))
    recorded = {name: getattr(output, name, None) for name in ("hidden_states", "attentions")}
    return BaseModelOutputWithPooling(last_hidden_state=states, **recorded)


def _pair(size: Any) -> tuple[int, int]:
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)


def examine_backbone(
    config: PreTrainedConfig, height: int | None = None, width: int | None = None
) -> tuple[tuple[int, int, int], set[str]]:
    """The shape `(channels, h, w)` of a vision backbone's features, and the parameters that they depend on, by name.

    Computed on the meta device, for an image of `height` x `width` pixels or else of the backbone's own size. Poolers
    and heads, which many backbones have, are not among the parameters.

    Raises:
        ValueError: If the backbone gives no features of patches, or none for images of this size.
    """
    own = _pair(getattr(config, "image_size", None) or 224)
    height, width = height or own[0], width or own[1]
    with torch.device("meta"), torch.enable_grad():
        backbone: Any = AutoModel.from_config(copy.deepcopy(config), trust_remote_code=False).eval()
        pixels = torch.empty(1, getattr(config, "num_channels", 3), height, width, dtype=backbone.dtype)
        try:
            features = _patch_features(backbone, pixels).last_hidden_state
        except Exception as error:  # of many models
            size = f"{height} x {width} pixels, its own size is {own[0]} x {own[1]}"
            raise ValueError(f"{type(backbone).__name__} gives no features of patches for {size}: {error}") from error
        features.sum().backward()
    used = {name for name, parameter in backbone.named_parameters() if parameter.grad is not None}
    return (features.shape[1], features.shape[2], features.shape[3]), used


def _backbone_width(config: PreTrainedConfig) -> int:
    width = getattr(config, "hidden_size", None) or (getattr(config, "hidden_sizes", None) or [0])[-1]
    return width or examine_backbone(config)[0][0]


class VLVPreTrainedModel(PreTrainedModel):
    config_class = VLVConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _no_split_modules = [  # noqa: RUF012
        "Florence2VisionBlock",
        "BartEncoderLayer",
        "BartDecoderLayer",
        "CLIPEncoderLayer",
        "CLIPTextEmbeddings",
        "VLVProjector",
    ]
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        _unregister(cls)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VLVModel):
            init.normal_(module.query_tokens, mean=0.0, std=self.config.query_initializer_range)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """The image encoder; with `modality="image"` its vision tower, which a vision backbone is itself."""
        encoder = self.base_model.image_encoder
        is_backbone = self.config.query_decoder_config is not None and modality == "image"
        return encoder if modality is None or is_backbone else encoder.get_encoder(modality)

    def set_encoder(self, encoder: nn.Module, modality: str | None = None) -> None:
        if modality is None or (modality == "image" and self.config.query_decoder_config is not None):
            self.base_model.image_encoder = encoder
        else:
            self.base_model.image_encoder.set_encoder(encoder, modality)

    def _refuse_unused(self, kwargs: dict[str, Any]) -> None:
        """Raises `TypeError` for an argument of `forward` that has no effect; the message gives the nearest name.

        None counts as not given, and `use_cache=False` is accepted.
        """
        for name, value in kwargs.items():
            if value is None or name in RECORDING_ARGUMENTS or (name == "use_cache" and not value):
                continue
            known = [p for p in inspect.signature(self.forward).parameters if p != "kwargs"]
            near = difflib.get_close_matches(name, [*known, *RECORDING_ARGUMENTS], n=1, cutoff=0.7)
            hint = f"; did you mean {near[0]!r}?" if near else f"; expected {', '.join(known)}"
            raise TypeError(f"{type(self).__name__}.forward does not use the argument {name!r}{hint}")


TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")  # the names in diffusers' pipelines
RECORDING_ARGUMENTS = ("output_hidden_states", "output_attentions", "return_dict")


def encode_text_embeds(
    text_encoder: CLIPTextModel,
    inputs_embeds: torch.Tensor | None = None,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The last hidden state `(B, N, d_text)` of a CLIP text model for embeddings `(B, N, d_text)`, or for words."""
    return _clip_hidden_states(text_encoder, inputs_embeds, input_ids, attention_mask)[-1]


def _clip_hidden_states(
    text_encoder: CLIPTextModel,
    inputs_embeds: torch.Tensor | None = None,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Input embeddings and each layer's output, `(B, N, d_text)`, of a CLIP text model; the last is normalised.

    `CLIPTextModel.forward` takes token ids alone. This computes the same: position embeddings, causal attention, final
    layer norm.
    """
    hidden = text_encoder.embeddings(input_ids=input_ids, inputs_embeds=inputs_embeds)
    mask = create_causal_mask(text_encoder.config, hidden, attention_mask, None)  # no cache, whose name has changed
    states = [hidden]
    for layer in text_encoder.encoder.layers:
        states.append(layer(states[-1], mask, is_causal=True))
    return [*states[:-1], text_encoder.final_layer_norm(states[-1])]


def _build_text_encoder(config: PreTrainedConfig, with_projection: bool) -> Any:
    if with_projection:
        return CLIPTextModelWithProjection._from_config(config)
    has_encoder_class = type(config) in AutoModelForTextEncoding._model_mapping
    return (AutoModelForTextEncoding if has_encoder_class else AutoModel).from_config(config)


class VLVModel(VLVPreTrainedModel):
    """Image to caption embeddings: Florence-2, learnable query tokens, a projector, and the text encoder `T`.

    In place of Florence-2 there may be a vision backbone, `multi_modal_projector` and `query_decoder`.

    Stage 1 trains this model, and reconstruction uses it. The text encoder belongs to it and is stored once, here; in
    training it is frozen (`vlv.train.freeze_for_stage1`).
    """

    _can_record_outputs = {"hidden_states": CLIPEncoderLayer, "attentions": CLIPAttention}  # noqa: RUF012

    def __init__(self, config: VLVConfig):
        super().__init__(config)
        d_model = config.query_token_dim
        if config.query_decoder_config is None:
            self.image_encoder: Any = Florence2Model._from_config(config.image_encoder_config)
        else:
            if config.image_encoder_config.model_type == "dinov3_vit":
                # The library's dot, unescaped, also renames the layer_scale of a layer that has its name already.
                names = [WeightRenaming(r"(?<!model\.)layer\.", r"model.layer.")]
                register_checkpoint_conversion_mapping("dinov3_vit", names, overwrite=True)
            self.image_encoder = AutoModel.from_config(config.image_encoder_config, trust_remote_code=False)
            self.multi_modal_projector = VLVImageProjection(_backbone_width(config.image_encoder_config), d_model)
            self.query_decoder = BartDecoder._from_config(config.query_decoder_config)
            self.query_decoder.embed_tokens = None  # the queries are no words
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, d_model))  # (1, Q, d_model)
        self.projector = VLVProjector(d_model, config.caption_embed_dim)
        for number, encoder_config in enumerate(config.text_encoder_configs):
            text_encoder = _build_text_encoder(encoder_config, number in config.pooled_conditioning)
            self.add_module(TEXT_ENCODERS[number], text_encoder)
        self.post_init()

    @property
    def text_encoders(self) -> list[Any]:
        """The text encoders, in order."""
        return [getattr(self, name) for name in TEXT_ENCODERS[: len(self.config.text_encoder_configs)]]

    def get_image_projection(self) -> Any:
        """The module that makes image tokens `(B, P, d_model)` of features `(B, channels, h, w)`."""
        return (self.image_encoder if self.config.query_decoder_config is None else self).multi_modal_projector

    def get_query_decoder(self) -> Any:
        """The decoder whose input are the query tokens."""
        own = self.config.query_decoder_config
        return self.image_encoder.language_model.decoder if own is None else self.query_decoder

    @classmethod
    def from_vision_text_pretrained(
        cls,
        image_encoder: str,
        text_encoder: str | Sequence[PreTrainedModel],
        *,
        text_encoder_subfolder: str | None = "text_encoder",
        dtype: torch.dtype = torch.float32,
        **config_kwargs,
    ) -> VLVModel:
        """Starts stage 1 from a pretrained image encoder and the text encoder of a diffusion model.

        Args:
            image_encoder (`str`):
                Folder or repo id of a Florence-2 in transformers' format, e.g. `florence-community/Florence-2-large`,
                or of a vision backbone, e.g. `google/siglip2-base-patch16-256`, whose query decoder is new. Of a model
                of images and text the vision part is loaded.
            text_encoder (`str` or `Sequence[PreTrainedModel]`):
                Folder or repo id of a diffusers pipeline (with `text_encoder_subfolder=None`, of a CLIP text model),
                or the text encoders themselves.
            dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
                Precision of all parts, whatever they are stored in. Training in mixed precision needs full weights.
            config_kwargs:
                Fields of [`VLVConfig`], such as `num_query_tokens`, `task_prompt_ids` and, for several text encoders,
                `conditioning_layers` and `pooled_conditioning`. By default there are as many query tokens as the text
                encoders have positions, but at most 77, and Florence-2's task prompt is used where the vocabulary is
                Florence-2's.

        Raises:
            OSError: If `image_encoder` could not be loaded.
            ValueError: If `image_encoder` is a Florence-2 in Microsoft's own format, gives no features of patches, or
                lacks weights.
        """
        vision = load_image_encoder(image_encoder)
        if isinstance(text_encoder, str):
            subfolder = {"subfolder": text_encoder_subfolder} if text_encoder_subfolder else {}
            text_encoder = [CLIPTextModel.from_pretrained(text_encoder, **subfolder)]
        text_configs = {
            f"{name}_config": model.config for name, model in zip(TEXT_ENCODERS, text_encoder, strict=False)
        }
        positions = VLVConfig(**copy.deepcopy(text_configs), num_query_tokens=1).num_text_positions
        config_kwargs.setdefault("num_query_tokens", min(positions, 77))
        is_florence = isinstance(vision.config, Florence2Config)
        if is_florence and vision.config.text_config.vocab_size > max(FLORENCE_TASK_PROMPT_IDS):
            config_kwargs.setdefault("task_prompt_ids", FLORENCE_TASK_PROMPT_IDS)
        sub_configs = {"image_encoder_config": vision.config, **text_configs}
        model = from_sub_configs(cls, sub_configs, dtype, **config_kwargs)
        model.image_encoder.load_state_dict(vision.state_dict())
        for own, loaded in zip(model.text_encoders, text_encoder, strict=True):
            own.load_state_dict(loaded.state_dict())
        return model.eval()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_encoder.set_input_embeddings(value)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        """Resizes the embeddings of the text encoder's words."""
        return self.text_encoder.resize_token_embeddings(*args, **kwargs)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """The vision tower's output.

        Returns:
            `pooler_output`, the projected image tokens `(B, 1 + h * w, d_model)`: their mean first, then the grid. And
            `last_hidden_state` `(B, channels, h, w)`, and on request `hidden_states` and `attentions`, of the vision
            tower. Class and register tokens of a backbone are left out.
        """
        self._refuse_unused(kwargs)
        own, is_florence = self.config.image_encoder_config, self.config.query_decoder_config is None
        expected = own.vision_config.in_channels if is_florence else getattr(own, "num_channels", 3)
        if pixel_values.ndim != 4 or pixel_values.shape[1] != expected:
            raise ValueError(
                f"pixel_values must be (batch, {expected}, height, width), got {tuple(pixel_values.shape)}; "
                "VLVProcessor prepares them from images"
            )
        # The dtype of a norm, because quantisation leaves norms alone.
        project = self.get_image_projection()
        pixel_values = pixel_values.to(dtype=project.image_proj_norm.weight.dtype)
        if is_florence:
            return self.image_encoder.get_image_features(pixel_values, **kwargs)
        recorded = {name: value for name, value in kwargs.items() if name in RECORDING_ARGUMENTS and value}
        output = _patch_features(self.image_encoder, pixel_values, **recorded)
        output.pooler_output = project(output.last_hidden_state)
        return output

    def get_caption_embeds(
        self, pixel_values: torch.Tensor | None = None, image_features: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Caption embeddings `z` of shape `(B, Q, d_text)` of images, or of their features (see `forward`)."""
        tokens: Any  # (B, image tokens, d_model)
        if image_features is None:
            tokens = self.get_image_features(pixel_values).pooler_output
        else:
            project = self.get_image_projection()
            tokens = image_features.to(project.image_proj_norm.weight.dtype)
            tokens = project(tokens) if tokens.ndim == 4 else tokens
            if tokens.ndim != 3 or tokens.shape[2] != self.query_tokens.shape[2]:
                raise ValueError(
                    f"image_features must be (batch, image tokens, {self.query_tokens.shape[2]}), got "
                    f"{tuple(tokens.shape)}; get_image_features gives them as pooler_output"
                )
        memory = self._encode_with_prompt(tokens) if self.config.query_decoder_config is None else tokens
        queries = self.query_tokens.to(memory).expand(len(memory), -1, -1)  # (B, Q, d_model)
        mask: torch.Tensor | None = None
        if self.config.attend_all_queries:
            shape = (len(memory), 1, self.config.num_query_tokens, self.config.num_query_tokens)
            mask = memory.new_zeros(shape)  # masks nothing; without a mask the decoder is causal
        states = self.get_query_decoder()(
            inputs_embeds=queries, attention_mask=mask, encoder_hidden_states=memory, use_cache=False
        ).last_hidden_state
        return self.projector(states)

    def _encode_with_prompt(self, tokens: torch.Tensor) -> torch.Tensor:
        """Image tokens `(B, P, d_model)`, and the task prompt after them, through Florence-2's transformer encoder."""
        transformer = self.image_encoder.language_model
        if self.config.task_prompt_ids:
            prompt = torch.tensor([self.config.task_prompt_ids], device=tokens.device)
            prompt_embeds = transformer.shared(prompt).to(tokens.device).expand(len(tokens), -1, -1)
            tokens = torch.cat([tokens, prompt_embeds], dim=1)  # (B, image tokens + prompt, d_model)
        positions = self.config.image_encoder_config.text_config.max_position_embeddings
        if tokens.shape[1] > positions:
            raise ValueError(
                f"the image (with the task prompt) gives {tokens.shape[1]} tokens, but the encoder has {positions} "
                "positions; make images smaller (the image processor's size, --encoder_image_size in training)"
            )
        return transformer.encoder(inputs_embeds=tokens, use_cache=False).last_hidden_state

    def encode_caption_embeds(self, caption_embeds: torch.Tensor) -> torch.Tensor:
        """`T(z)`, `(B, N, d_cond)`: caption embeddings `(B, N, d_text)` through the text encoders, without BOS or EOS.

        Raises:
            ValueError: If the shape does not fit the text encoders.
        """
        return self._encode_text(self._parts_of(caption_embeds))[0]

    def _parts_of(self, caption_embeds: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        """The part of caption embeddings that each text encoder reads, `(B, N, its width)`."""
        positions, width = self.config.num_text_positions, self.config.caption_embed_dim
        if (
            caption_embeds.ndim != 3
            or caption_embeds.shape[2] != width
            or not 1 <= caption_embeds.shape[1] <= positions
        ):
            raise ValueError(
                f"caption_embeds must be (batch, 1 to {positions}, {width}), got {tuple(caption_embeds.shape)}; "
                "are they from another model?"
            )
        parts = caption_embeds.split([config.hidden_size for config in self.config.text_encoder_configs], dim=2)
        return [{"inputs_embeds": part} for part in parts]

    def _encode_text(self, inputs: Sequence[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Conditioning `(B, N, d_cond)` and pooled conditioning `(B, d_pooled)`.

        Args:
            inputs: Of each text encoder: `inputs_embeds` or `input_ids`, and `attention_mask`.
        """
        states: list[torch.Tensor] = []
        pooled: list[torch.Tensor] = []
        for number, (text_encoder, given) in enumerate(zip(self.text_encoders, inputs, strict=True)):
            layers = self.config.conditioning_layers[number]
            projects = number in self.config.pooled_conditioning
            clip = text_encoder.text_model if projects else text_encoder
            embeds = given.get("inputs_embeds")
            if isinstance(clip, CLIPTextModel):
                if embeds is not None:  # the dtype of a norm, because quantisation leaves norms alone
                    given = given | {"inputs_embeds": embeds.to(clip.final_layer_norm.weight.dtype)}
                hidden = _clip_hidden_states(clip, **given)
            else:
                given = given if embeds is None else given | {"inputs_embeds": embeds.to(text_encoder.dtype)}
                output = text_encoder(**given, output_hidden_states=True)
                hidden = [*output.hidden_states[:-1], output.last_hidden_state]
            states += [hidden[layer] for layer in layers]
            if projects:
                pooled.append(text_encoder.text_projection(_final_states(hidden[-1], clip, given.get("input_ids"))))
        return (
            torch.cat(states, dim=2) if len(states) > 1 else states[0],
            torch.cat(pooled, dim=1) if pooled else None,
        )

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        caption_embeds: torch.Tensor | None = None,
        input_ids: torch.Tensor | Sequence[torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        **kwargs,
    ) -> VLVModelOutput:
        """Caption embeddings and their conditioning.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, height, width)`):
                Images as [`VLVImageProcessor`] prepares them.
            caption_embeds (`torch.Tensor` of shape `(B, N, d_text)`):
                Caption embeddings that exist already. No image is encoded.
            input_ids (`torch.Tensor` of shape `(B, N)`, or one for each text encoder):
                Words in the text encoder's vocabulary, for prompts, negative prompts and the unconditional context.
                The output has no caption embeddings.
            attention_mask (`torch.Tensor` of shape `(B, N)`, *optional*): Of `input_ids`.
            image_features (`torch.Tensor` of shape `(B, P, d_model)` or `(B, channels, h, w)`):
                What `get_image_features` gives, `pooler_output` or `last_hidden_state`. The vision tower does not run.
            kwargs: `output_hidden_states`, `output_attentions` (needs `attn_implementation="eager"`), `return_dict`.

        Raises:
            ValueError: Unless exactly one of pixel_values, caption_embeds, input_ids and image_features is given.
            TypeError: For an argument that has no effect.
        """
        self._refuse_unused(kwargs)
        if sum(given is not None for given in (pixel_values, caption_embeds, input_ids, image_features)) != 1:
            raise ValueError("pass exactly one of pixel_values, caption_embeds, input_ids and image_features")
        if attention_mask is not None and input_ids is None:
            raise ValueError("attention_mask belongs to input_ids; leave it out")
        if input_ids is not None:
            count = len(self.text_encoders)
            ids = [input_ids] * count if isinstance(input_ids, torch.Tensor) else input_ids
            if len(ids) != count:
                raise ValueError(f"input_ids are {len(ids)} tensors for {count} text encoders; give one for each")
            masked = {} if attention_mask is None else {"attention_mask": attention_mask}
            states, pooled = self._encode_text([{"input_ids": own, **masked} for own in ids])
            return VLVModelOutput(conditioning=states, pooled_conditioning=pooled)
        z: Any = self.get_caption_embeds(pixel_values, image_features) if caption_embeds is None else caption_embeds
        states, pooled = self._encode_text(self._parts_of(z))
        return VLVModelOutput(caption_embeds=z, conditioning=states, pooled_conditioning=pooled)


def _final_states(states: torch.Tensor, clip: CLIPTextModel, input_ids: torch.Tensor | None) -> torch.Tensor:
    """The state `(B, d_text)` of each text as a whole: at its EOS, as in `CLIPTextModel`, else the last position."""
    if input_ids is None:
        return states[:, -1]
    is_end = input_ids == clip.eos_token_id
    places = input_ids.argmax(dim=1) if clip.eos_token_id == 2 else is_end.int().argmax(dim=1)  # as in CLIPTextModel
    return states[torch.arange(len(states), device=states.device), places]


def load_image_encoder(source: str) -> Any:
    """A pretrained Florence-2 or vision backbone. No code of a repository runs.

    Raises:
        OSError: If it could not be loaded.
        ValueError: If it is a Florence-2 in Microsoft's own format, gives no features of patches, or lacks weights.
    """
    config = image_encoder_config(source)
    if isinstance(config, Florence2Config):
        model, report = Florence2Model.from_pretrained(source, output_loading_info=True)
        used = set(model.state_dict())
    else:
        used = examine_backbone(config)[1]
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # the weights of a model's text part, which are not used, are a long list
        try:
            model, report = AutoModel.from_pretrained(
                source, config=config, output_loading_info=True, trust_remote_code=False
            )
        finally:
            logging.set_verbosity(verbosity)
    missing = sorted(used & set(report["missing_keys"])) + sorted(str(key) for key in report["mismatched_keys"])
    if missing:
        raise ValueError(f"{len(missing)} weights of {source} are missing or of another shape, such as {missing[0]}")
    return model


def image_encoder_config(source: str) -> Any:
    """The configuration of a Florence-2, or of the vision backbone of a model, in a folder or Hub repository.

    Raises:
        OSError: If there is no such folder or repository.
        ValueError: If it is a Florence-2 in Microsoft's own format, or no vision backbone.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(
            f"image_encoder {source} could not be loaded: {' '.join(str(error).split())}; give the folder or the repo "
            "id of a Florence-2 or of a vision backbone, and for a gated repository log in (hf auth login) after "
            "accepting its terms"
        ) from error
    if not isinstance(config, Florence2Config):
        try:
            return vision_part(config)
        except ValueError as error:
            raise ValueError(f"image_encoder {source} does not fit: {error}") from error
    if hasattr(config.vision_config, "dim_embed"):
        raise ValueError(
            f"{source} is a Florence-2 in Microsoft's own format; use florence-community/Florence-2-large "
            "or -base, or convert it: vlv convert --florence DIR --output NEW_DIR"
        )
    return config


def from_sub_configs(
    model_class: Any, sub_configs: dict[str, PreTrainedConfig], dtype: torch.dtype, **config_kwargs
) -> Any:
    """A new model of precision `dtype`. Each part keeps the attention implementation that `sub_configs` name."""
    implementations = {
        name: config._attn_implementation for name, config in sub_configs.items() if config._attn_implementation
    }
    config = VLVConfig(**copy.deepcopy(sub_configs), **config_kwargs)
    return model_class._from_config(config, dtype=dtype, attn_implementation=implementations)


__all__ = ["VLVConfig", "VLVModel", "VLVModelOutput", "VLVPreTrainedModel"]
