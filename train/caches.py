"""The caches of a training: of each image what a frozen part computes, once.

* Moments (stage 1): the mean and log-variance of its latents, which the autoencoder gives.
* Vision features (both stages): the image tokens, which the vision tower and their projection give.
* Conditioning (stage 2): the caption embeddings behind the text encoder, which a frozen encoder gives.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from torch import nn
from transformers import PreTrainedConfig

from vlv import VLVImageProcessor, VLVModel
from vlv.diffusion_decoder import DiffusionDecoder
from vlv.modeling_vlv import examine_backbone

from .checkpoints import say
from .data import TrainingDataset
from .data.collators import diffusion_pixels
from .data.feature_cache import FeatureCache

PREPROCESSING = (
    *("size", "pre_crop_size", "resample", "do_resize", "do_rescale", "rescale_factor", "do_normalize"),
    *("image_mean", "image_std", "do_center_crop", "crop_size", "do_pad", "pad_size"),
)
"""Settings of the image processor that vision features and conditioning depend on."""
NO_SETTINGS = ("transformers_version", "_name_or_path", "architectures", "dtype")
"""Entries of a configuration that do not change what a model of given weights computes."""
CONDITIONING_DTYPES = ("bfloat16", "float32")


def weights_fingerprint(*modules: nn.Module | None) -> str:
    """A hash of the names and values of all weights, in the precision in which they are computed with."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()) if module is not None else ():
            digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def trained_fingerprint(model: nn.Module) -> str:
    """A hash of the names and values of the parameters that are trained."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            values: Any = parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            digest.update(name.encode())
            digest.update(values)
    return digest.hexdigest()


def settings_fingerprint(*settings: Any) -> str:
    """A hash of what besides weights an encoder depends on: activations, heads, epsilons and so on.

    Args:
        settings: Configurations of parts (or None), and JSON values. Who wrote a configuration does not count.
    """
    values = [part.to_dict() if isinstance(part, PreTrainedConfig) else part for part in settings]
    text = json.dumps(_without_writer(values), sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _without_writer(value: Any) -> Any:
    """JSON values without the entries of a configuration that do not say what is computed."""
    if isinstance(value, dict):
        return {str(k): _without_writer(v) for k, v in value.items() if k not in NO_SETTINGS}
    return [_without_writer(item) for item in value] if isinstance(value, (list, tuple)) else value


def to_unit_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 to float32 in -1..1, the input of the autoencoder."""
    return pixels.float() / 127.5 - 1


def diffusion_image_size(args: Any, image_processor: VLVImageProcessor, decoder: DiffusionDecoder) -> int:
    """Side in pixels of the images that the diffusion model sees."""
    return args.diffusion_image_size or image_processor.pre_crop_size or decoder.image_size


def open_moments(
    args: Any, datasets: Sequence[TrainingDataset], image_processor: VLVImageProcessor, decoder: DiffusionDecoder
) -> FeatureCache | None:
    """The cache of `cache_moments`, with all images of some data sets; None where that is not set.

    Moments have the precision of the autoencoder (`vae_dtype`), so that the latents that are drawn from them are those
    that the autoencoder would give. With the cache, the autoencoder's encoder is removed from the decoder.

    Raises:
        ValueError: If the folder holds the cache of another autoencoder or of other sizes.
        OSError: If the cache does not fit on the disk.
    """
    if args.cache_moments is None:
        return None
    size = diffusion_image_size(args, image_processor, decoder)
    made_of = {
        "autoencoder": weights_fingerprint(*decoder.image_encoder_parts()),
        "diffusion_image_size": size,
        "pre_crop_size": image_processor.pre_crop_size or None,
        "resampling": "PIL bicubic, after the crop",
    }
    shape, dtype = decoder.moments_shape(size), getattr(torch, args.vae_dtype)
    cache = FeatureCache(args.cache_moments, made_of, shape, dtype)
    _fill(cache, args, datasets, image_processor, partial(diffusion_pixels, size=size), _Encoder(decoder, args.device))
    decoder.remove_image_encoder()
    return cache


def open_vision_features(
    args: Any, datasets: Sequence[TrainingDataset], image_processor: VLVImageProcessor, encoder: VLVModel
) -> FeatureCache | None:
    """The cache of `cache_vision_features`, with all images of some data sets; None where that is not set.

    Features are the image tokens `(P, d_model)` that the transformer reads, or, where their projection is
    trained, the vision tower's output `(channels, h, w)`. They have the precision of the training, as the matrix
    products that read them.

    Args:
        encoder: Its parameters require gradients if they are trained, now or later.

    Raises:
        ValueError: If the vision tower is trained, or the folder holds the cache of another tower or preprocessing.
        OSError: If the cache does not fit on the disk.
    """
    if args.cache_vision_features is None:
        return None
    pixels = _encoder_pixels([Image.new("RGB", (1, 1))], image_processor)
    shape, projected = vision_features(args, encoder, *pixels.shape[-2:])
    tower: Any = encoder.get_encoder("image")
    projection = encoder.get_image_projection()
    half = _half_of(args)
    dtype = half or tower.dtype
    made_of = {
        "vision_tower": weights_fingerprint(tower),
        "settings": settings_fingerprint(encoder.config.image_encoder_config),
        "image_projection": weights_fingerprint(projection) if projected else None,
        **_preprocessing(image_processor),
    }
    cache = FeatureCache(args.cache_vision_features, made_of, shape, dtype)
    compute = _VisionTower(encoder, args.device, half, projected)
    collate = partial(_encoder_pixels, image_processor=image_processor)
    _fill(cache, args, datasets, image_processor, collate, compute)
    return cache


def open_conditioning(
    args: Any, datasets: Sequence[TrainingDataset], image_processor: VLVImageProcessor, encoder: VLVModel
) -> FeatureCache | None:
    """The cache of `cache_conditioning`, with all images of some data sets; None where that is not set.

    It holds what the language projection reads of an image, `(Q, d_cond)`, in `conditioning_dtype`.

    Args:
        encoder: Its parameters require gradients if they are trained, now or later.

    Raises:
        ValueError: If a part of the encoder is trained, or the folder holds the cache of another encoder or
            preprocessing.
        OSError: If the cache does not fit on the disk.
    """
    if args.cache_conditioning is None:
        return None
    check_conditioning_is_fixed(args, encoder)
    config, half = encoder.config, _half_of(args)
    made_of = {
        "encoder": weights_fingerprint(encoder),
        "settings": settings_fingerprint(
            config.image_encoder_config, config.query_decoder_config, *config.text_encoder_configs
        ),
        "computed_in": str(half or encoder.dtype).removeprefix("torch."),
        **{name: getattr(config, name) for name in ("task_prompt_ids", "attend_all_queries", "conditioning_layers")},
        **_preprocessing(image_processor),
    }
    shape, dtype = (config.num_query_tokens, config.conditioning_dim), getattr(torch, args.conditioning_dtype)
    cache = FeatureCache(args.cache_conditioning, made_of, shape, dtype)
    collate = partial(_encoder_pixels, image_processor=image_processor)
    _fill(cache, args, datasets, image_processor, collate, _CaptionEncoder(encoder, args.device, half))
    return cache


def check_conditioning_is_fixed(args: Any, encoder: VLVModel) -> None:
    """Raises `ValueError` if a part of the encoder is trained, now or later."""
    if _is_trained(encoder):
        raise ValueError(
            f"cache_conditioning does not work with {_trained_by(args)}, which trains the encoder: its caption "
            "embeddings change in each step; choose 'projector' or 'projector+lm', or leave it out "
            "(cache_vision_features works with a frozen vision tower)"
        )


def vision_features(args: Any, encoder: VLVModel, height: int, width: int) -> tuple[tuple[int, ...], bool]:
    """The shape of the cached features of an image, and whether they are projected.

    Args:
        encoder: Its parameters require gradients if they are trained, now or later.
        height, width: Of the encoder's input, in pixels.

    Raises:
        ValueError: If the vision tower is trained.
    """
    if _is_trained(encoder.get_encoder("image")):
        raise ValueError(
            f"cache_vision_features does not work with {_trained_by(args)}, which trains the vision tower: its "
            f"features change in each step; choose one of {args.TRAINABLE[:-1]}, or leave it out"
        )
    config = encoder.config.image_encoder_config
    if encoder.config.query_decoder_config is None:
        h, w = (_positions(side, config.vision_config) for side in (height, width))
        channels = config.vision_config.embed_dim[-1]
    else:
        (channels, h, w), _ = examine_backbone(config, height, width)
    projected = not _is_trained(encoder.get_image_projection())
    return ((1 + h * w, encoder.config.query_token_dim) if projected else (channels, h, w)), projected


def _fill(
    cache: FeatureCache,
    args: Any,
    datasets: Sequence[TrainingDataset],
    image_processor: VLVImageProcessor,
    collate: Callable[[list[Image.Image]], torch.Tensor],
    compute: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Adds the images that are missing. All processes of the run share the work."""
    state = PartialState()
    for dataset in datasets:
        cache.build(
            dataset,
            image_processor,
            collate,
            compute,
            batch_size=args.train_batch_size,
            num_workers=args.dataloader_num_workers,
            rank=args.process_index,
            num_ranks=args.world_size,
            wait_for_everyone=state.wait_for_everyone,
            say=say,
        )


def _trained_by(args: Any) -> str:
    """The setting that says what is trained."""
    if args.unfreeze is not None:
        return f"unfreeze {args.unfreeze!r}"
    return f"trainable {args.trainable!r}" + (
        " with encoder_lora_rank" if getattr(args, "encoder_lora_rank", 0) else ""
    )


def _half_of(args: Any) -> torch.dtype | None:
    """The half precision of the training, if it has one."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def _preprocessing(image_processor: VLVImageProcessor) -> dict[str, Any]:
    settings = json.loads(image_processor.to_json_string())
    return {name: settings.get(name) for name in PREPROCESSING}


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _encoder_pixels(images: list[Image.Image], image_processor: VLVImageProcessor) -> torch.Tensor:
    """Images, as `load_item` returns them, to `(B, 3, height, width)`."""
    return image_processor(images, return_tensors="pt", pre_crop_size=None).pixel_values


def _positions(side: int, config: Any) -> int:
    """The side of the vision tower's grid, for images of `side` pixels."""
    for kernel, stride, padding in zip(config.patch_size, config.patch_stride, config.patch_padding, strict=True):
        side = (side + 2 * padding - kernel) // stride + 1
    return side


class _VisionTower:
    """Computes vision features, in the precision of the training, on the device only if something is computed."""

    def __init__(self, encoder: VLVModel, device: torch.device, half: torch.dtype | None, projected: bool):
        self.encoder, self.device, self.half, self.projected = encoder, device, half, projected

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        for part in (self.encoder.get_encoder("image"), self.encoder.get_image_projection()):
            part.to(self.device).eval()
        with torch.autocast(self.device.type, dtype=self.half, enabled=self.half is not None):
            output = self.encoder.get_image_features(pixels.to(self.device))
        return output.pooler_output if self.projected else output.last_hidden_state


class _CaptionEncoder:
    """Computes conditioning, in the precision of the training, on the device only if something is computed."""

    def __init__(self, encoder: VLVModel, device: torch.device, half: torch.dtype | None):
        self.encoder, self.device, self.half = encoder, device, half

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        encoder: Any = self.encoder.to(self.device).eval()
        with torch.autocast(self.device.type, dtype=self.half, enabled=self.half is not None):
            return encoder(pixels.to(self.device)).conditioning


class _Encoder:
    """Computes moments. The autoencoder's encoder is on the device only if something is computed."""

    def __init__(self, decoder: DiffusionDecoder, device: torch.device):
        self.decoder, self.device = decoder, device

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        for part in self.decoder.image_encoder_parts():
            if part is not None:
                part.to(self.device)
        return self.decoder.encode_moments(to_unit_range(pixels.to(self.device)))
