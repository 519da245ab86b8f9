"""The authors' method, rebuilt with the modules of this library, so that both sides have the same weights and kernels.

From their public code: images are prepared one at a time inside the step and go twice through PIL; every caption is
padded to 300 tokens; the language model gives logits at all positions, the image prefix and the padding among them;
nothing computed is kept; generation makes its beams before the prefix is read; the context of the empty prompt is
computed in each call; sampling is ancestral, 50 steps.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch.nn import functional as F

from vlv.diffusion_decoder import Conditioning

from .models import Models

MAX_CAPTION_TOKENS = 300
STEPS, GUIDANCE = 50, 2.0


def read_image(path: Path, size: int) -> torch.Tensor:
    """Decoded, its shorter side resized to `size`, and cropped at the center: `(3, size, size)`, uint8."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    width, height = image.size
    short = min(width, height)
    image = image.resize((int(size * width / short), int(size * height / short)), Image.Resampling.BILINEAR)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)


def to_pixel_values(models: Models, batch: torch.Tensor) -> torch.Tensor:
    """The encoder's input of uint8 images `(B, 3, S, S)`, prepared one at a time."""
    processor = models.processor.image_processor
    images = (Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in batch)
    return torch.cat([processor(image, return_tensors="pt", pre_crop_size=None).pixel_values for image in images])


def read_batch(models: Models, paths: Sequence[Path]) -> torch.Tensor:
    return torch.stack([read_image(path, models.image_size) for path in paths])


def stage1_loss(models: Models, paths: Sequence[Path], seed: int) -> torch.Tensor:
    """The denoising loss of images, from their files."""
    batch = read_batch(models, paths)
    torch.manual_seed(seed)
    latents = models.decoder.encode_images(batch.float() / 255 * 2 - 1)
    output = models.captioner.model(to_pixel_values(models, batch))
    return models.decoder.denoise(latents, Conditioning.of(output)).loss


def stage2_loss(models: Models, paths: Sequence[Path]) -> torch.Tensor:
    """The next-token loss of captions, from the files of images and captions."""
    pixel_values = to_pixel_values(models, read_batch(models, paths))
    prefix, mask, _ = models.captioner.get_prefix(pixel_values)
    tokenizer = models.processor.tokenizer
    texts = [path.with_suffix(".txt").read_text() for path in paths]
    ids, counted = caption_ids(tokenizer, texts)
    language_model: Any = models.captioner.language_model
    embeds = torch.cat([prefix, language_model.get_input_embeddings()(ids)], dim=1)
    logits = language_model(inputs_embeds=embeds, attention_mask=torch.cat([mask, counted], dim=1)).logits.float()
    labels = torch.cat([torch.full_like(mask, -100), ids.masked_fill(counted == 0, -100)], dim=1)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def caption_ids(tokenizer: Any, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask `(B, 300)`: each caption with its end, cut to 300 tokens and padded to them.

    The authors append no end, so that their captions do not learn to stop; here both sides learn from the same tokens.
    """
    rows = [[*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for text in texts]
    rows = [row[:MAX_CAPTION_TOKENS] for row in rows]
    width = MAX_CAPTION_TOKENS
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])


@torch.no_grad()
def captions(models: Models, paths: Sequence[Path], num_beams: int, batch_size: int = 1, **settings: Any) -> list[str]:
    """Captions of image files in batches."""
    found = []
    language_model: Any = models.captioner.language_model
    for start in range(0, len(paths), batch_size):
        pixel_values = to_pixel_values(models, read_batch(models, paths[start : start + batch_size]))
        prefix, mask, _ = models.captioner.get_prefix(pixel_values)
        ids = language_model.generate(
            inputs_embeds=prefix, attention_mask=mask, num_beams=num_beams, do_sample=False, **settings
        )
        found += models.processor.batch_decode(ids, skip_special_tokens=True)
    return [caption.strip() for caption in found]


@torch.no_grad()
def reconstruct(models: Models, paths: Sequence[Path], seed: int) -> torch.Tensor:
    """Reconstructions `(B, 3, S, S)` in 0..1 of image files by 50 ancestral steps in one batch.

    The authors draw all noise from one stream; here each image has its own, as on the other side.
    """
    pipeline: Any = models.pipeline
    output = models.captioner.model(to_pixel_values(models, read_batch(models, paths)))
    length = pipeline.tokenizer.model_max_length
    tokens = pipeline.tokenizer([""] * len(paths), padding="max_length", max_length=length, return_tensors="pt")
    empty = models.captioner.model.text_encoder(tokens.input_ids).last_hidden_state
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(STEPS)
    generators = [torch.Generator().manual_seed(seed) for _ in paths]
    side = models.image_size // pipeline.vae_scale_factor
    latents = randn_tensor((len(paths), pipeline.unet.config.in_channels, side, side), generators)
    for timestep in scheduler.timesteps:
        if empty.shape == output.conditioning.shape:
            context = torch.cat([empty, output.conditioning])
            noise_of_empty, noise = pipeline.unet(torch.cat([latents] * 2), timestep, context).sample.chunk(2)
        else:  # where the authors' code fails: the miniature has fewer embeddings than its text encoder has positions
            contexts = (empty, output.conditioning)
            noise_of_empty, noise = (pipeline.unet(latents, timestep, context).sample for context in contexts)
        noise = noise_of_empty + GUIDANCE * (noise - noise_of_empty)
        latents = scheduler.step(noise, timestep, latents, generator=generators).prev_sample
    images = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    return (images / 2 + 0.5).clamp(0, 1)
