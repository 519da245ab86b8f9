"""The miniature's captioner, trained further to follow instructions: the language model reads one before it writes."""

import os
import random
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset

from vlv import VLVForConditionalGeneration, VLVProcessor, hub
from vlv.train import freeze_for_stage2

from .data import SceneDataset
from .grammar import write_caption
from .instructions import INSTRUCTIONS
from .tokenizer import build_tokenizer
from .training import train_module

SHARE = 0.5
"""The share of pairs with an instruction."""
EMBEDS_PER_FILE = 1000


class InstructedPairs(Dataset):
    """Items are `{"caption_embeds": (Q, d_text), "prompt": str, "caption": str}`, in the order of `scenes`.

    Half of the prompts are empty. Their captions are those of `write_caption`.
    """

    def __init__(self, scenes: SceneDataset, caption_embeds: torch.Tensor):
        self.scenes, self.caption_embeds = scenes, caption_embeds

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = random.Random(f"instructions/{self.scenes.seed}/{index}")
        scene = self.scenes[index]["scene"]
        item = {"caption_embeds": self.caption_embeds[index]}
        if rng.random() < SHARE:
            instruction = rng.choice(INSTRUCTIONS)
            return item | {"prompt": instruction.text, "caption": instruction.write(scene)}
        return item | {"prompt": "", "caption": write_caption(scene, rng)}


@torch.no_grad()
def encode_scenes(
    model: VLVForConditionalGeneration, processor: VLVProcessor, scenes: SceneDataset, folder: Path
) -> torch.Tensor:
    """Caption embeddings `(N, Q, d_text)` of scenes. They are kept in `folder`; several processes share the work."""
    state = PartialState(cpu=True)
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(scenes), EMBEDS_PER_FILE)
    files = [folder / f"caption-embeds-{start:06d}.safetensors" for start in starts]
    for start, path in list(zip(starts, files, strict=True))[state.process_index :: state.num_processes]:
        if path.exists():
            continue
        embeds = []
        for first in range(start, min(start + EMBEDS_PER_FILE, len(scenes)), 50):
            items = [scenes[i] for i in range(first, min(first + 50, start + EMBEDS_PER_FILE, len(scenes)))]
            pixel_values = processor(images=[item["pixels"] for item in items]).pixel_values
            embeds.append(model.model(pixel_values=pixel_values).caption_embeds)
        part = path.with_suffix(".part")
        save_file({"caption_embeds": torch.cat(embeds)}, part)
        part.replace(path)
    state.wait_for_everyone()
    return torch.cat([load_file(path)["caption_embeds"] for path in files])


def train_instructed_captioner(
    output_dir: str | Path,
    work_dir: str | Path,
    captioner_dir: str | Path,
    pairs: int = 20_000,
    epochs: float = 6,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> None:
    """Trains the language projection and the language model on `pairs` image-caption pairs, half with an instruction.

    The encoder is frozen, and its embeddings are computed once. The tokens of instructions and JSON are added to the
    language model's vocabulary.
    """
    torch.manual_seed(seed)
    model, processor = hub.load_captioner(captioner_dir)
    scenes = SceneDataset(pairs, seed=seed + 4, fields=("pixels", "scene"))
    embeds = encode_scenes(model, processor, scenes, Path(work_dir) / "caption-embeds")
    scenes.fields = ("scene",)
    processor = VLVProcessor(
        processor.image_processor,
        build_tokenizer(for_text_encoder=False, instructions=True),
        image_seq_length=model.config.num_query_tokens,
    )
    model.config.image_token_id = processor.image_token_id
    model.language_model.resize_token_embeddings(len(processor.tokenizer))
    model.config.text_config.vocab_size = len(processor.tokenizer)
    model.config.instructions = [instruction.text for instruction in INSTRUCTIONS]
    freeze_for_stage2(model, "projector+lm")

    def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = processor(text=[item["prompt"] for item in items], suffix=[item["caption"] for item in items])
        return {**batch, "caption_embeds": torch.stack([item["caption_embeds"] for item in items])}

    train_module(
        model,
        InstructedPairs(scenes, embeds),
        work_dir,
        batch_size=batch_size,
        learning_rate=learning_rate,
        data_collator=collate,
        seed=seed,
        num_train_epochs=epochs,
        weight_decay=0.0,
        adam_beta2=0.999,
        logging_steps=25,
        save_steps=200,
    )
    if int(os.environ.get("RANK", "0")) == 0:
        model.save_pretrained(output_dir)
        processor.save_pretrained(output_dir)
