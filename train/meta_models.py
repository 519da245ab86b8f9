"""The models of a training configuration on the meta device: full size, no weights, no network."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from torch import nn
from transformers import AutoConfig, CLIPTextModel, Florence2Config

from vlv import FLORENCE_TASK_PROMPT_IDS, VLVConfig, VLVForConditionalGeneration, VLVImageProcessor, VLVModel, hub
from vlv import reference_configs as reference
from vlv.diffusion_decoder import FAMILIES, Conditioning, DiffusionDecoder, find_family
from vlv.language_model import find_gguf
from vlv.modeling_vlv import TEXT_ENCODERS

from .caches import check_conditioning_is_fixed, vision_features
from .freezing import freeze_for_stage1, freeze_for_stage2
from .lora import add_lora
from .memory import enable_activation_checkpointing
from .meta_rounds import VAE_ENCODER, RoundCount, count_round
from .modes import set_train_mode
from .stage1_trainer import FLORENCE_IMAGE_SIZE, Stage1Config
from .stage2_trainer import LANGUAGE_MODEL, Stage2Config
from .stage3_config import Stage3Config

FLORENCES = {f"florence-community/Florence-2-{size}": size for size in reference.FLORENCE}
QWENS = {f"Qwen/Qwen2.5-{size}": size for size in reference.QWEN}


@dataclass
class MetaStep:
    """One training step on the meta device.

    Args:
        loss: Computes the loss of one batch of one device.
        parts: Modules by name, in the order in which they compute; a `ModuleList` stands for its modules.
        models: All models that take part.
        bf16: Those under bfloat16 autocast.
        precision: `"bf16"` or `"fp32"` by part; parts that are not named have the precision of `default_precision`.
        num_labels: Number of caption tokens of a batch with a loss.
        round: Stage 3: what sampling and scoring cost before the steps of a round.
    """

    loss: Callable[[], torch.Tensor]
    parts: dict[str, nn.Module]
    models: list[nn.Module]
    bf16: list[nn.Module]
    default_precision: str
    precision: dict[str, str] = field(default_factory=dict)
    num_labels: int = 0
    round: RoundCount | None = None


def build_step(
    config: Stage1Config | Stage2Config,
    *,
    stage1: Stage1Config | None = None,
    stage2: Stage2Config | None = None,
    caption_tokens: int | None = None,
    cached_moments: bool = False,
    cached_features: bool = False,
) -> MetaStep:
    """The step that a configuration describes.

    Args:
        stage1: The recipe that will make the model of stage 2, where that does not exist.
        stage2: For stage 3: the recipe that will make `config.model`, where that does not exist.
        caption_tokens: Tokens of the longest caption in a batch; by default `max_caption_tokens`.
        cached_moments: The autoencoder's encoder does not run, as with `cache_moments`.
        cached_features: The vision tower does not run, as with `cache_vision_features`.

    Raises:
        ValueError: If a model is not known; the message says what to give. If vision features are cached and the
            vision tower is trained.
    """
    cached_features = cached_features or config.cache_vision_features is not None
    if isinstance(config, Stage1Config):
        return _stage1(config, cached_moments or config.cache_moments is not None, cached_features)
    if isinstance(config, Stage3Config):
        return _stage3(config, stage1, stage2, caption_tokens, cached_features)
    return _stage2(config, _captioner_of(config, stage1), caption_tokens, cached_features)


def _encoder_input(config: Any, model: VLVModel, side: int, cached_features: bool) -> Callable[[], dict[str, Any]]:
    """Gives what a step reads of images: images of `side` pixels, their features, or their conditioning."""
    batch = config.per_device_train_batch_size
    if getattr(config, "cache_conditioning", None) is not None:
        check_conditioning_is_fixed(config, model)
        size = (batch, model.config.num_query_tokens, model.config.conditioning_dim)
        return lambda: {"conditioning": torch.empty(size, device="meta")}
    if not cached_features:
        return lambda: {"pixel_values": torch.empty(batch, 3, side, side, device="meta")}
    shape, _ = vision_features(config, model, side, side)
    return lambda: {"image_features": torch.empty(batch, *shape, device="meta")}


def _stage1(config: Stage1Config, cached_moments: bool, cached_features: bool) -> MetaStep:
    vlv_config, encoder_size, crop = encoder_of(config)
    with torch.device("meta"):
        model = VLVModel(vlv_config)
    half = config.bf16 or config.fp16
    vae_dtype = getattr(torch, config.vae_dtype)
    dtype = torch.bfloat16 if half else torch.float32
    decoder = build_diffusion_decoder(_diffusion_model_of(config.diffusion_model, config.model), dtype, vae_dtype)
    freeze_for_stage1(model, config.trainable)
    _checkpoint(config, model)
    if config.diffusion_gradient_checkpointing:
        decoder.enable_gradient_checkpointing()
    set_train_mode(model)
    batch = config.per_device_train_batch_size
    size = config.diffusion_image_size or crop or decoder.image_size
    latent_size = size // decoder.scale_factor

    @torch.no_grad()
    def encode() -> torch.Tensor:
        if cached_moments:
            channels = decoder.vae.config.latent_channels
            return torch.empty(batch, channels, latent_size, latent_size, device="meta")
        pixels = torch.empty(batch, 3, size, size, dtype=vae_dtype, device="meta")
        return decoder.vae.encode(pixels).latent_dist.sample().float()

    images = _encoder_input(config, model, encoder_size, cached_features)

    def loss() -> torch.Tensor:
        latents = encode()
        return decoder.denoising_loss(latents, Conditioning.of(model(**images())))

    return MetaStep(
        loss,
        {"vae_encoder": decoder.vae.encoder, **_encoder_parts(model), "denoiser": decoder.denoiser},
        [model, decoder],
        [model] if half else [],
        "bf16" if half else "fp32",
        {"vae_encoder": "bf16" if vae_dtype == torch.bfloat16 else "fp32"},
    )


def _diffusion_model_of(diffusion_model: str | None, model: str | None) -> str:
    """The text-to-image model that is set, or else the one of the model to continue from."""
    if diffusion_model is not None:
        return diffusion_model
    found = hub.diffusion_model_of(str(model), Path(str(model)))
    if found is None:
        raise ValueError(f"diffusion_model is not set, and {model} does not name the one it was trained with")
    return found.source


def _stage2(
    config: Stage2Config,
    captioner: tuple[VLVConfig, int, int | None],
    caption_tokens: int | None,
    cached_features: bool,
) -> MetaStep:
    vlv_config, encoder_size, _ = captioner
    with torch.device("meta"):
        model = VLVForConditionalGeneration(vlv_config)
    freeze_for_stage2(model, config.trainable)
    if config.lora_rank:
        add_lora(model, config.lora_rank)
    _checkpoint(config, model)
    set_train_mode(model)
    half = config.bf16 or config.fp16
    batch = config.per_device_train_batch_size
    tokens = config.max_caption_tokens if config.pad_to_max_length or caption_tokens is None else caption_tokens

    images = _encoder_input(config, model.model, encoder_size, cached_features)

    def loss() -> torch.Tensor:
        labels = torch.empty(batch, tokens, dtype=torch.long, device="meta")
        return model(**images(), labels=labels).loss

    return MetaStep(
        loss,
        {
            **_encoder_parts(model.model),
            "language_projection": model.language_projection,
            "language_model": model.language_model,
        },
        [model],
        [model] if half else [],
        "bf16" if half else "fp32",
        num_labels=batch * tokens,
    )


def _stage3(
    config: Stage3Config,
    stage1: Stage1Config | None,
    stage2: Stage2Config | None,
    caption_tokens: int | None,
    cached_features: bool,
) -> MetaStep:
    if stage1 is not None and config.diffusion_model is not None:
        stage1 = copy.copy(stage1)
        stage1.diffusion_model = config.diffusion_model
    if stage2 is None:
        _check_writes_captions(config, stage1)
    captioner = _captioner_of(config if stage2 is None else stage2, stage1)
    _, encoder_size, crop = captioner
    step = _stage2(config, captioner, caption_tokens, cached_features)
    half = config.bf16 or config.fp16
    if stage1 is not None:
        source = _diffusion_model_of(stage1.diffusion_model, stage1.model)
    else:
        source = _diffusion_model_of(config.diffusion_model, (config if stage2 is None else stage2).model)
    dtype = torch.bfloat16 if half else torch.float32
    decoder = build_diffusion_decoder(source, dtype, getattr(torch, config.vae_dtype))
    model: Any = step.models[0]
    images = None
    if config.cache_conditioning is None:
        images = _encoder_input(config, model.model, encoder_size, cached_features=False)
    image_size = config.diffusion_image_size or crop or decoder.image_size
    step.round = count_round(
        *(config, model, decoder, images, image_size, caption_tokens or config.max_caption_tokens), half=half
    )
    step.models.append(decoder)
    vae_precision = "bf16" if config.vae_dtype == "bfloat16" else "fp32"
    step.precision = dict.fromkeys(step.round.parts, step.default_precision) | {VAE_ENCODER: vae_precision}
    return step


def _check_writes_captions(config: Stage3Config, stage1: Stage1Config | None) -> None:
    """Raises `ValueError` unless the model of stage 3 exists and has a language model."""
    if config.model is None:
        raise ValueError("model is not set: give the captioner to start from")
    if stage1 is None and config.model not in FLORENCES:
        try:
            if _local(VLVConfig, config.model, "model", FLORENCES).text_config is not None:
                return
        except ValueError as error:
            raise ValueError(
                f"model {config.model} is not known: it is neither a captioner's folder nor in the cache of "
                "downloads, and no recipe of stage 2 beside the configuration or its folder makes it; name that "
                "recipe by --stage2"
            ) from error
    raise ValueError(
        f"{config.model} is a stage-1 model, which writes no captions; give a captioner as --model, or the recipe of "
        "stage 2 that will make it as --stage2"
    )


def _encoder_parts(model: VLVModel) -> dict[str, nn.Module]:
    is_florence = model.config.query_decoder_config is None
    return {
        "vision_tower": model.get_encoder("image"),
        "image_projection": model.get_image_projection(),
        **({"transformer_encoder": model.image_encoder.language_model.encoder} if is_florence else {}),
        "transformer_decoder" if is_florence else "query_decoder": model.get_query_decoder(),
        "projector": model.projector,
        **{name: _computing(encoder) for name, encoder in zip(TEXT_ENCODERS, model.text_encoders, strict=False)},
    }


def _computing(text_encoder: Any) -> nn.Module:
    """What of a text encoder `VLVModel` calls: the layers of a CLIP text model, or a complete other model."""
    clip = getattr(text_encoder, "text_model", text_encoder)
    return clip.encoder.layers if isinstance(clip, CLIPTextModel) else text_encoder


def _checkpoint(config: Any, model: Any) -> None:
    if config.activation_checkpointing:
        model.activation_checkpointing_enable()
    enable_activation_checkpointing(model, config)


def encoder_of(config: Stage1Config) -> tuple[VLVConfig, int, int | None]:
    """The model that stage 1 trains, the side of its input, and the side of the crop before it, in pixels."""
    if config.model is not None:
        vlv_config, processor = _local_vlv(config.model)
        return vlv_config, processor.size["height"], processor.pre_crop_size or None
    assert config.image_encoder is not None and config.diffusion_model is not None
    if config.image_encoder in FLORENCES:
        vision: Any = reference.florence_config(FLORENCES[config.image_encoder])
    else:
        vision = _local(AutoConfig, config.image_encoder, "image_encoder", FLORENCES, trust_remote_code=False)
    family, configs = text_to_image_configs(config.diffusion_model, with_optional=config.t5_text_encoder)
    names = [*family.text_encoders, *(family.optional_text_encoders if config.t5_text_encoder else ())]
    text_configs = {f"{name}_config": configs[name] for name in names}
    positions = VLVConfig(**copy.deepcopy(text_configs), num_query_tokens=1).num_text_positions
    own: dict[str, Any] = {"query_decoder_config": config.query_decoder()}
    own_size = getattr(getattr(vision, "vision_config", vision), "image_size", None)
    if isinstance(vision, Florence2Config):
        has_words = vision.text_config.vocab_size > max(FLORENCE_TASK_PROMPT_IDS)
        own, own_size = {"task_prompt_ids": FLORENCE_TASK_PROMPT_IDS if has_words else []}, FLORENCE_IMAGE_SIZE
    size = config.encoder_image_size or own_size
    if not isinstance(size, int):
        raise ValueError(f"encoder_image_size is not set, and image_encoder {config.image_encoder} names no size")
    vlv_config = VLVConfig(
        image_encoder_config=vision,
        **text_configs,
        **family.text_settings(len(names)),
        num_query_tokens=config.num_query_tokens or min(positions, 77),
        attend_all_queries=config.attend_all_queries,
        **own,
    )
    return vlv_config, size, config.pre_crop_size


def text_to_image_configs(
    source: str, text_encoders: bool = True, with_optional: bool = False
) -> tuple[type[DiffusionDecoder], dict[str, Any]]:
    """The family of a text-to-image model, and the configuration of each model, text encoder and scheduler.

    Args:
        source: One of `reference_configs.TEXT_TO_IMAGE`, or a folder or cached repository in diffusers' format.
        text_encoders: Also those of the text encoders, which a VLV's folder does not have.
        with_optional: Also those of the text encoders that the family works without (`t5_text_encoder`).

    Raises:
        ValueError: If it is neither, or of no supported family, or has no such text encoders.
    """
    known = reference.TEXT_TO_IMAGE
    if source in known:
        name, components = known[source]
        family = next(family for family in FAMILIES if family.family == name)
        index = dict.fromkeys(components, ("", ""))

        def config_of(part: Any, name: str) -> Any:
            return part.config_class(**components[name]) if name in TEXT_ENCODERS else components[name]

    else:
        index = _local(DiffusionPipeline, source, "diffusion_model", known, "load_config")
        family = find_family(index, source)

        def config_of(part: Any, name: str) -> Any:
            if name in TEXT_ENCODERS:
                return _local(part.config_class, source, "diffusion_model", known, subfolder=name)
            return _local(part, source, "diffusion_model", known, "load_config", subfolder=name)

    parts: dict[str, Any] = {**family.model_classes(), "scheduler": DDPMScheduler}
    if text_encoders:
        parts |= family.text_encoders
    if with_optional:
        optional = family.optional_text_encoders
        if not optional or any(index.get(name, [None])[0] is None for name in optional):
            raise ValueError(f"t5_text_encoder is set, but {source} has no T5; leave t5_text_encoder out")
        parts |= optional
    return family, {name: config_of(part, name) for name, part in parts.items()}


def _captioner_of(config: Stage2Config, stage1: Stage1Config | None) -> tuple[VLVConfig, int, int | None]:
    """As `encoder_of`, with a language model."""
    if config.model in FLORENCES:
        vlv_config, size, crop = encoder_of(Stage1Config(image_encoder=config.model))
    elif stage1 is not None and not Path(config.model or "").exists():
        vlv_config, size, crop = encoder_of(stage1)
    elif config.model is None:
        raise ValueError(f"model is not set; give a stage-1 model's folder, or one of {', '.join(FLORENCES)}")
    else:
        vlv_config, processor = _local_vlv(config.model)
        size, crop = processor.size["height"], processor.pre_crop_size or None
    if vlv_config.text_config is None or config.replace_language_model:
        language_model = config.language_model or LANGUAGE_MODEL
        if language_model in QWENS:
            vlv_config.text_config = reference.qwen_config(QWENS[language_model])
        else:
            vlv_config.text_config = _gguf_config(language_model, config.gguf_file) or _local(
                AutoConfig, language_model, "language_model", QWENS
            )
    return vlv_config, size, crop


def _gguf_config(source: str, gguf_file: str | None) -> Any:
    """The configuration in a GGUF file; None if `source` is none. Raises `ValueError` if it cannot be read."""
    try:
        gguf = find_gguf(source, gguf_file)
        return None if gguf is None else AutoConfig.from_pretrained(**gguf, local_files_only=True)
    except Exception as error:  # damaged files raise any class
        reason = " ".join(str(error).split())
        raise ValueError(f"the GGUF file of language_model {source} cannot be read: {reason}") from error


def _local_vlv(source: str) -> tuple[VLVConfig, VLVImageProcessor]:
    vlv_config = _local(VLVConfig, source, "model", FLORENCES)
    try:
        return vlv_config, VLVImageProcessor.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {source} has no readable preprocessor_config.json: {error}") from error


def build_diffusion_decoder(
    source: str, dtype: torch.dtype = torch.float32, vae_dtype: torch.dtype = torch.float32
) -> DiffusionDecoder:
    """The decoder of a text-to-image model on the meta device; `source` is that of `text_to_image_configs`."""
    found, configs = text_to_image_configs(source, text_encoders=False)
    family: Any = found
    with torch.device("meta"):
        parts = {name: part.from_config(configs[name]) for name, part in family.model_classes().items()}
    denoiser = parts[family.denoiser_name()]
    torch.nn.Module.to(denoiser, dtype)  # diffusers' own `to` warns of layers to keep in float32, also without any
    return family(parts["vae"], denoiser, configs["scheduler"], vae_dtype=vae_dtype).to("meta")


def _local(kind: Any, source: str, setting: str, known: dict, method: str = "from_pretrained", **kwargs: Any) -> Any:
    """A configuration from a folder or the cache of the Hub."""
    try:
        with warnings.catch_warnings():  # diffusers passes huggingface_hub a deprecated argument
            warnings.simplefilter("ignore", UserWarning)
            return getattr(kind, method)(source, local_files_only=True, **kwargs)
    except (OSError, ValueError) as error:
        file = {DiffusionPipeline: "model_index.json", DDPMScheduler: "scheduler_config.json"}.get(kind, "config.json")
        inside = f"{kwargs['subfolder']}/{file}" if "subfolder" in kwargs else file
        raise ValueError(
            f"{setting} {source} is not known: it is neither a folder with {inside} nor in the cache of downloads; "
            f"give such a folder, or one of {', '.join(known)}"
        ) from error
