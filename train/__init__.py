"""Trainers: stage 1 from images alone, stage 2 from image-caption pairs."""

from .callbacks import PerProcessSeedCallback, ValidationCallback
from .data import ColumnDataset, ListDataset, Stage1Collator, Stage2Collator, find_images, load_images, load_pairs
from .modes import set_train_mode
from .stage1 import Stage1Config, Stage1Trainer, freeze_for_stage1
from .stage2 import Stage2Config, Stage2Trainer, freeze_for_stage2
from .trainer import VLVTrainer, last_checkpoint

__all__ = [
    "ColumnDataset",
    "ListDataset",
    "PerProcessSeedCallback",
    "Stage1Collator",
    "Stage1Config",
    "Stage1Trainer",
    "Stage2Collator",
    "Stage2Config",
    "Stage2Trainer",
    "VLVTrainer",
    "ValidationCallback",
    "find_images",
    "freeze_for_stage1",
    "freeze_for_stage2",
    "last_checkpoint",
    "load_images",
    "load_pairs",
    "set_train_mode",
]
