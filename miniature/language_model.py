"""The miniature's language model: Qwen2's architecture, trained on captions of `train` as plain text."""

from functools import partial
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from .data import SceneDataset
from .tokenizer import BEGIN, END, PAD, build_tokenizer
from .training import train_module

WIDTH, LAYERS = 128, 3


def build_language_model(
    tokenizer: PreTrainedTokenizerBase, width: int = WIDTH, layers: int = LAYERS
) -> Qwen2ForCausalLM:
    """A `Qwen2ForCausalLM` with heads of 32 and tied embeddings. The default sizes give 0.6 million parameters."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=max(1, width // 64),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
        bos_token_id=tokenizer.convert_tokens_to_ids(BEGIN),
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
    )
    return Qwen2ForCausalLM(config)


def collate_captions(items: list[dict], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """`input_ids` `(B, L)` of captions between begin and end tokens, and `labels`, -100 where a caption is padded."""
    texts = [f"{BEGIN} {item['caption']} {END}" for item in items]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    return {"input_ids": batch.input_ids, "labels": labels}


def train_language_model(
    output_dir: str | Path,
    work_dir: str | Path,
    captions: int = 100_000,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
    seed: int = 0,
    width: int = WIDTH,
    layers: int = LAYERS,
) -> None:
    """Trains on captions without images, and saves the model and its tokenizer to `output_dir`."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(for_text_encoder=False)
    model = build_language_model(tokenizer, width, layers)
    train_module(
        model,
        SceneDataset(captions, seed=seed + 3, fields=("caption",)),
        work_dir,
        batch_size=batch_size,
        learning_rate=learning_rate,
        data_collator=partial(collate_captions, tokenizer=tokenizer),
        seed=seed,
    )
    model.generation_config = GenerationConfig(
        pad_token_id=model.config.pad_token_id,
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        max_new_tokens=64,
    )
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
