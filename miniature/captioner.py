"""The miniature's captioner: stage 2, with the trainer of `vlv.train`, on image-caption pairs of `train`."""

from pathlib import Path

import torch

from vlv import VLVForConditionalGeneration, VLVImageProcessor, VLVProcessor
from vlv.tokenizer import load_tokenizer
from vlv.train import Stage2Config, Stage2Trainer, freeze_for_stage2, last_checkpoint

from .data import SceneDataset
from .training import hardware_arguments, per_process_batch_size


class ImageCaptionPairs(SceneDataset):
    """Items as stage 2 reads them: `{"image": (3, 64, 64) uint8 tensor, "caption": str}`."""

    def __init__(self, length: int, split: str = "train", seed: int = 0):
        super().__init__(length, split, seed, fields=("pixels", "caption"))

    def __getitem__(self, index: int) -> dict:
        item = super().__getitem__(index)
        return {"image": item["pixels"], "caption": item["caption"]}


def train_captioner(
    output_dir: str | Path,
    work_dir: str | Path,
    encoder_dir: str | Path,
    language_model_dir: str | Path,
    pairs: int = 20_000,
    epochs: float = 4,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    trainable: str = "projector+lm",
    seed: int = 0,
) -> None:
    """Trains stage 2 on `pairs` different image-caption pairs, `epochs` times.

    The encoder is frozen, so captions and reconstructions are generated from the same embeddings, those of stage 1.
    """
    torch.manual_seed(seed)
    model = VLVForConditionalGeneration.from_vlv_text_pretrained(str(encoder_dir), str(language_model_dir))
    processor = VLVProcessor(VLVImageProcessor.from_pretrained(encoder_dir), load_tokenizer(language_model_dir))
    freeze_for_stage2(model, trainable)
    config = Stage2Config(
        output_dir=str(work_dir),
        trainable=trainable,
        max_steps=int(pairs * epochs) // batch_size,
        per_device_train_batch_size=per_process_batch_size(batch_size),
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        max_caption_tokens=64,
        logging_steps=25,
        save_steps=200,
        validation_steps=200,
        seed=seed,
        **hardware_arguments(),
    )
    trainer = Stage2Trainer(
        model,
        config,
        ImageCaptionPairs(pairs, seed=seed + 4),
        processor,
        validation_dataset=ImageCaptionPairs(8, split="test", seed=37),
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(work_dir))
    if trainer.is_world_process_zero():
        model.save_pretrained(output_dir)
        processor.save_pretrained(output_dir)
