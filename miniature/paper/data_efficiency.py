"""How many image-caption pairs a captioner needs, and what it is that saves them (VLV paper, tables 4, 5 and 7).

Captioners differ in one thing at a time: where their encoder comes from, how many pairs they see, what learns, which
language model reads. All make the same number of updates. Where the encoder rests, its conditioning is computed once
for all of them, which changes nothing but the time it takes.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import nn
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

from vlv import VLVForConditionalGeneration, VLVModel, VLVProcessor, hub
from vlv.modeling_vlv import VLVModelOutput

from ..captioner import ImageCaptionPairs
from ..encoder import build_encoder_config, build_image_processor, initialize_encoder
from ..data import evaluation_items
from ..grammar import parse_caption
from ..scoring import score_scenes

UPDATES = 800
BATCH_SIZE = 64
WARMUP = 50
LEARNING_RATE = 1e-3
PAIRS = (200, 1_000, 5_000, 20_000)
SCENES = 300  # of each split, to judge captions by
MAX_TOKENS = 64


class Ready(nn.Module):
    """Stands in for an encoder that rests: takes its conditioning, computed before, as if it were embeddings."""

    def forward(self, pixel_values: torch.Tensor | None = None, caption_embeds: torch.Tensor | None = None):
        return VLVModelOutput(caption_embeds=caption_embeds, conditioning=caption_embeds)


def untrained_encoder(teacher_dir: str | Path, seed: int) -> VLVModel:
    """What stage 1 starts from: the encoder's own random weights, the teacher's text encoder."""
    teacher = StableDiffusionPipeline.from_pretrained(teacher_dir, safety_checker=None)
    torch.manual_seed(seed)
    model = VLVModel(build_encoder_config(teacher.text_encoder.config))
    model.text_encoder.load_state_dict(teacher.text_encoder.state_dict())
    initialize_encoder(model)
    return model.eval()


def to_pixel_values(pictures: torch.Tensor) -> torch.Tensor:
    """`(B, 3, 64, 64)` uint8 to what the encoder sees, as the miniature's image processor does."""
    processor = build_image_processor()
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    return (pictures.float() / 255 - mean) / std


@torch.no_grad()
def condition(encoder: VLVModel, pictures: torch.Tensor, batch_size: int = 128) -> torch.Tensor:
    """`T(z)` of pictures `(N, 3, 64, 64)` uint8."""
    return torch.cat(
        [encoder(pixel_values=to_pixel_values(chunk)).conditioning for chunk in pictures.split(batch_size)]
    )


class CaptionedPictures:
    """So many pairs of the training split in memory: `pictures` (N, 3, 64, 64) uint8 and `labels` (N, L)."""

    def __init__(self, count: int, processor: VLVProcessor, seed: int):
        items = [pairs[i] for pairs in (ImageCaptionPairs(count, seed=seed + 4),) for i in range(count)]
        self.pictures = torch.stack([item["image"] for item in items])
        self.labels = processor(suffix=[item["caption"] for item in items]).labels


def train_from_pairs(
    model: VLVForConditionalGeneration,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    updates: int = UPDATES,
    seed: int = 0,
    encoder_learning_rate: float = LEARNING_RATE,
) -> None:
    """Trains what of `model` requires gradients.

    Args:
        encoder_learning_rate: Of the encoder, where it learns.
        inputs: Pictures `(N, 3, 64, 64)` uint8, or the conditioning `(N, Q, d_text)` of an encoder that rests.
        labels: `(N, L)`, padded with -100.
    """
    learning = [p for p in model.parameters() if p.requires_grad]
    encoder = {id(p) for p in model.model.parameters()}
    groups: list[dict[str, Any]] = [{"params": [p for p in learning if id(p) not in encoder]}]
    if inside := [p for p in learning if id(p) in encoder]:
        groups.append({"params": inside, "lr": encoder_learning_rate})
    optimiser = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimiser, WARMUP, updates)
    draws = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    model.train()
    for _ in range(updates):
        while len(order) < BATCH_SIZE:  # one pass after the other, each in its own order
            order = torch.cat([order, torch.randperm(len(inputs), generator=draws)])
        chosen, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
        target = labels[chosen]
        target = target[:, : int((target != -100).sum(1).max())]
        loss = model(**_inputs(inputs[chosen]), labels=target).loss
        loss.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    model.eval()


def _inputs(chosen: torch.Tensor) -> dict[str, Any]:
    if chosen.dtype == torch.uint8:
        return {"pixel_values": to_pixel_values(chosen)}
    return {"caption_embeds": chosen}


@torch.no_grad()
def score_captions(
    model: VLVForConditionalGeneration, processor: VLVProcessor, inputs: torch.Tensor, truth: list
) -> dict:
    """Scores of greedy captions."""
    captions: list[str] = []
    for chunk in inputs.split(100):
        ids = model.generate(**_inputs(chunk), max_new_tokens=MAX_TOKENS, do_sample=False)
        captions += processor.batch_decode(ids, skip_special_tokens=True)
    return score_scenes([parse_caption(caption) for caption in captions], truth)


def measure_captioner(
    encoder: VLVModel,
    language_model_dir: str | Path,
    pairs: int,
    *,
    learns: str = "projector+lm",
    updates: int = UPDATES,
    seed: int = 0,
    encoder_learning_rate: float = LEARNING_RATE,
) -> dict[str, Any]:
    """Trains a captioner on so many pairs and scores its captions of unseen scenes.

    Args:
        encoder: Of any origin; it is not changed unless it learns.
        learns: `"projector"`, `"projector+lm"`, or `"everything"`: the whole encoder, too, but not the text encoder.
        encoder_learning_rate: Of the encoder, where it learns.
        seed: Of the projector's first weights, of the pairs and of their order.

    Returns:
        `{split: scores}`.
    """
    torch.manual_seed(seed)
    processor = VLVProcessor(build_image_processor(), hub.load_tokenizer(language_model_dir))
    language_model = AutoModelForCausalLM.from_pretrained(language_model_dir)
    model = VLVForConditionalGeneration.from_vlv_text_pretrained(encoder, language_model)
    model.requires_grad_(learns != "projector")
    model.language_projection.requires_grad_(True)
    model.model.requires_grad_(learns == "everything")
    model.model.text_encoder.requires_grad_(False)
    model.model.image_encoder.language_model.shared.requires_grad_(False)
    data = CaptionedPictures(pairs, processor, seed)
    rests = learns != "everything"
    inputs = condition(encoder, data.pictures) if rests else data.pictures
    if rests:
        model.model = Ready()
    train_from_pairs(model, inputs, data.labels, updates, seed, encoder_learning_rate)
    scores = {}
    for split in ("test", "combo"):
        pictures, truth = evaluation_items(split, SCENES)
        shown = condition(encoder, pictures) if rests else pictures
        scores[split] = score_captions(model, processor, shown, truth)
    return scores
