"""Trainers: stage 1 from images alone, stage 2 from image-caption pairs, stage 3 from images alone.

`stage1.py`, `stage2.py` and `stage3.py` are the scripts of `vlv train`. They are not imported here, so that
`python -m vlv.train.stage1` runs the only copy of its module.
"""

from vlv.image_files import find_images

from .callbacks import PerProcessSeedCallback, ProgressBarCallback, ValidationCallback
from .checkpoints import last_checkpoint
from .data import (
    ColumnDataset,
    ListDataset,
    Stage1Collator,
    Stage2Collator,
    TrainingDataset,
    load_images,
    load_pairs,
)
from .freezing import freeze_for_stage1, freeze_for_stage2
from .modes import set_train_mode
from .stage1_trainer import Stage1Config, Stage1Trainer
from .stage2_trainer import Stage2Config, Stage2Trainer
from .stage3_config import Stage3Config
from .stage3_trainer import Stage3Trainer
from .trainer import VLVTrainer
from .unfreezing import UnfreezingCallback

__all__ = [
    "ColumnDataset",
    "ListDataset",
    "PerProcessSeedCallback",
    "ProgressBarCallback",
    "Stage1Collator",
    "Stage1Config",
    "Stage1Trainer",
    "Stage2Collator",
    "Stage2Config",
    "Stage2Trainer",
    "Stage3Config",
    "Stage3Trainer",
    "TrainingDataset",
    "UnfreezingCallback",
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
