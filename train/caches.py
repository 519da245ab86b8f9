"""The cache of stage 1: of each image the mean and log-variance of its latents, which the autoencoder gives."""

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from vlv import VLVImageProcessor
from vlv.diffusion_decoder import DiffusionDecoder

from .checkpoints import say
from .data import TrainingDataset
from .data.collators import diffusion_pixels
from .data.feature_cache import FeatureCache


def weights_fingerprint(*modules: nn.Module | None) -> str:
    """A hash of the names and values of all weights, in the precision in which they are computed with."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()) if module is not None else ():
            digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


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
    state = PartialState()
    for dataset in datasets:
        cache.build(
            dataset,
            image_processor,
            partial(diffusion_pixels, size=size),
            _Encoder(decoder, args.device),
            batch_size=args.train_batch_size,
            num_workers=args.dataloader_num_workers,
            rank=args.process_index,
            num_ranks=args.world_size,
            wait_for_everyone=state.wait_for_everyone,
            say=say,
        )
    decoder.remove_image_encoder()
    return cache


class _Encoder:
    """Computes moments. The autoencoder's encoder is on the device only if something is computed."""

    def __init__(self, decoder: DiffusionDecoder, device: torch.device):
        self.decoder, self.device = decoder, device

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        for part in self.decoder.image_encoder_parts():
            if part is not None:
                part.to(self.device)
        return self.decoder.encode_moments(to_unit_range(pixels.to(self.device)))
