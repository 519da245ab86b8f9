"""How many image-caption pairs a captioner needs, and what lowers that number (VLV paper, tables 4, 5 and 7).

Captioners differ in one thing at a time: the origin of the encoder, the number of pairs, the trainable parts, or the
language model. All make the same number of updates unless a measurement says otherwise. The conditioning of a frozen
encoder is computed once, before training, which changes the time and nothing else.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import nn
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

from vlv import VLVForConditionalGeneration, VLVModel, VLVProcessor, hub
from vlv.modeling_vlv import VLVModelOutput
from vlv.pipelines import generate_captions
from vlv.train import freeze_for_stage1, freeze_for_stage2, set_train_mode

from ..captioner import ImageCaptionPairs
from ..data import evaluation_items
from ..encoder import build_encoder_config, build_image_processor, initialize_encoder
from ..grammar import parse_caption
from ..scoring import score_scenes
from ..world import Scene

UPDATES = 800
BATCH_SIZE = 64
WARMUP = 50
LEARNING_RATE = 1e-3
SCENES = 300  # captioned of each split
MAX_TOKENS = 64


class CachedConditioning(nn.Module):
    """Takes the place of a frozen encoder and returns its conditioning, computed before and given as embeddings."""

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        caption_embeds: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
    ) -> VLVModelOutput:
        return VLVModelOutput(caption_embeds=caption_embeds, conditioning=caption_embeds)


def untrained_encoder(teacher_dir: str | Path, seed: int) -> VLVModel:
    """The encoder before stage 1: random weights with the seed `seed`, and the teacher's text encoder."""
    teacher = StableDiffusionPipeline.from_pretrained(teacher_dir, safety_checker=None)
    torch.manual_seed(seed)
    model = VLVModel(build_encoder_config(teacher.text_encoder.config))
    model.text_encoder.load_state_dict(teacher.text_encoder.state_dict())
    initialize_encoder(model)
    return model.eval()


def to_pixel_values(images: torch.Tensor) -> torch.Tensor:
    """Normalises images `(B, 3, 64, 64)` uint8 as the miniature's image processor does."""
    processor = build_image_processor()
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    return (images.float() / 255 - mean) / std


@torch.no_grad()
def compute_conditioning(encoder: VLVModel, images: torch.Tensor, batch_size: int = 128) -> torch.Tensor:
    """Conditioning `(N, Q, d_text)` of images `(N, 3, 64, 64)` uint8."""
    return torch.cat([encoder(pixel_values=to_pixel_values(chunk)).conditioning for chunk in images.split(batch_size)])


class CaptionedImages:
    """The first `count` pairs of the training split in memory: `images` (N, 3, 64, 64) uint8, `labels` (N, L)."""

    def __init__(self, count: int, processor: VLVProcessor, seed: int):
        pairs = ImageCaptionPairs(count, seed=seed + 4)
        items = [pairs[i] for i in range(count)]
        self.images = torch.stack([item["image"] for item in items])
        self.labels = processor(suffix=[item["caption"] for item in items]).labels


def freeze(model: VLVForConditionalGeneration, trainable: str) -> None:
    """Freezes what is not trained.

    Args:
        trainable: `"projector"` or `"projector+lm"` as in stage 2; `"all"` adds everything that stage 1 trains.

    Raises:
        ValueError: If `trainable` is none of these.
    """
    if trainable not in ("projector", "projector+lm", "all"):
        raise ValueError(f"trainable is {trainable!r}; expected 'projector', 'projector+lm' or 'all'")
    freeze_for_stage2(model, trainable)
    if trainable == "all":
        freeze_for_stage1(model.model, "all")


def train_from_pairs(
    model: VLVForConditionalGeneration,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    updates: int = UPDATES,
    seed: int = 0,
    encoder_learning_rate: float = LEARNING_RATE,
) -> None:
    """Trains the parameters of `model` that require gradients.

    Args:
        inputs: Images `(N, 3, 64, 64)` uint8, or the conditioning `(N, Q, d_text)` of a frozen encoder.
        labels: `(N, L)`, padded with -100.
        seed: Of the order of the pairs.
        encoder_learning_rate: Of the encoder's trainable parameters; the others have `LEARNING_RATE`.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    encoder = {id(p) for p in model.model.parameters()}
    groups: list[dict[str, Any]] = [{"params": [p for p in trainable if id(p) not in encoder]}]
    if encoder_parameters := [p for p in trainable if id(p) in encoder]:
        groups.append({"params": encoder_parameters, "lr": encoder_learning_rate})
    optimiser = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimiser, WARMUP, updates)
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    set_train_mode(model)
    for _ in range(updates):
        while len(order) < BATCH_SIZE:  # one epoch after the other, each shuffled anew
            order = torch.cat([order, torch.randperm(len(inputs), generator=generator)])
        batch, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
        target = labels[batch]
        target = target[:, : int((target != -100).sum(1).max())]
        loss = model(**_model_inputs(inputs[batch]), labels=target).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    model.eval()


def _model_inputs(inputs: torch.Tensor) -> dict[str, Any]:
    if inputs.dtype == torch.uint8:
        return {"pixel_values": to_pixel_values(inputs)}
    return {"caption_embeds": inputs}


def score_captions(
    model: VLVForConditionalGeneration, processor: VLVProcessor, inputs: torch.Tensor, truth: list[Scene]
) -> dict[str, float]:
    """Scores of greedy captions; `inputs` as in `train_from_pairs`."""
    captions: list[str] = []
    for chunk in inputs.split(100):
        captions += generate_captions(model, processor, **_model_inputs(chunk), max_new_tokens=MAX_TOKENS)
    return score_scenes([parse_caption(caption) for caption in captions], truth)


def measure_captioner(
    encoder: VLVModel,
    language_model_dir: str | Path,
    pairs: int,
    *,
    trainable: str = "projector+lm",
    updates: int = UPDATES,
    seed: int = 0,
    encoder_learning_rate: float = LEARNING_RATE,
) -> dict[str, dict[str, float]]:
    """Trains a captioner on `pairs` image-caption pairs and scores its captions of unseen scenes.

    Args:
        encoder: Of any origin. It changes only where `trainable` is `"all"`.
        trainable: See `freeze`.
        seed: Of the projector's initial weights, of the pairs and of their order.
        encoder_learning_rate: Of the encoder, where it is trained.

    Returns:
        `{split: scores}`, the scores as in `score_scenes`.
    """
    torch.manual_seed(seed)
    processor = VLVProcessor(build_image_processor(), hub.load_tokenizer(language_model_dir))
    language_model = AutoModelForCausalLM.from_pretrained(language_model_dir)
    model = VLVForConditionalGeneration.from_vlv_text_pretrained(encoder, language_model)
    freeze(model, trainable)
    encoder_is_frozen = trainable != "all"
    data = CaptionedImages(pairs, processor, seed)
    inputs = compute_conditioning(encoder, data.images) if encoder_is_frozen else data.images
    if encoder_is_frozen:
        model.model = CachedConditioning()
    train_from_pairs(model, inputs, data.labels, updates, seed, encoder_learning_rate)
    scores = {}
    for split in ("test", "combo"):
        images, truth = evaluation_items(split, SCENES)
        inputs = compute_conditioning(encoder, images) if encoder_is_frozen else images
        scores[split] = score_captions(model, processor, inputs, truth)
    return scores
