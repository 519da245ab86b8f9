"""What the two stages share: settings, and how a run starts, goes on and ends."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, cast

from transformers import Trainer, TrainingArguments, set_seed

from .parsing import parse_config
from .trainer import last_checkpoint
from .training_metadata import write_training_metadata


@dataclass
class StageConfig(TrainingArguments):
    """Settings of both stages: what of the data is read, what learns, and the paper's optimiser (sec. 4.1)."""

    TRAINABLE: ClassVar[tuple[str, ...]] = ()

    split: str = field(default="train", metadata={"help": "Split of a data set."})
    image_column: str = field(default="image", metadata={"help": "Column of a data set or parquet file."})
    on_bad_image: str = field(default="skip", metadata={"help": "'skip' (said and counted) or 'error'."})
    trainable: str = field(default="all", metadata={"help": "What learns."})
    validation_steps: int = field(default=1000, metadata={"help": "Show samples every so many steps; 0: never."})
    num_validation_images: int = field(default=8, metadata={"help": "How many samples."})

    num_train_epochs: float = field(default=0, metadata={"help": "Passes over the data, in place of max_steps."})
    adam_beta2: float = field(default=0.99, metadata={"help": "Of AdamW."})
    weight_decay: float = field(default=0.01, metadata={"help": "Of AdamW."})
    save_steps: float = field(default=10_000, metadata={"help": "Save a checkpoint every so many steps."})
    logging_steps: float = field(default=50, metadata={"help": "Log every so many steps."})
    dataloader_num_workers: int = field(default=4, metadata={"help": "Processes that read and prepare images."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay false: the collator reads the columns."}
    )
    report_to: str = field(default="none", metadata={"help": "Such as 'trackio', 'tensorboard' or 'wandb'."})

    def __post_init__(self):
        super().__post_init__()
        if self.trainable not in self.TRAINABLE:
            raise ValueError(f"trainable is {self.trainable!r}; expected one of {self.TRAINABLE}")
        steps: int = cast(Any, self).max_steps
        if self.num_train_epochs:
            usual = next(f.default for f in fields(self) if f.name == "max_steps")
            if steps not in (-1, usual):
                raise ValueError(
                    f"max_steps is {steps} and num_train_epochs is {self.num_train_epochs}; give one of them"
                )
            self.max_steps = -1
        elif steps < 1:
            raise ValueError(f"max_steps is {steps}; give a number of steps, or num_train_epochs")
        if self.label_smoothing_factor:
            raise ValueError("label_smoothing_factor must be 0: both stages have losses of their own")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be false: the collator reads columns that no model knows")


def run_stage(
    stage: str,
    config_class: type[StageConfig],
    build: Callable[[Any], Trainer],
    facts: Callable[[Any], dict[str, Any]],
    arguments: Sequence[str] | None = None,
    before_saving: Callable[[Any], None] = lambda model: None,
) -> None:
    """Trains, resuming from the last checkpoint in `output_dir` if there is one, and saves the model there.

    Args:
        stage: `"stage1"` or `"stage2"`.
        build: Loads everything that the configuration names.
        facts: What of the configuration goes to the model card.
        arguments: Of the command line; by default this process's own.
        before_saving: Called with the trained model.
    """
    command = f"vlv train {stage}"
    config: Any = parse_config(config_class, sys.argv[1:] if arguments is None else arguments, command)
    set_seed(config.seed)
    try:
        trainer = build(config)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"{command}: {error}") from error
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint or last_checkpoint(config.output_dir))
    before_saving(trainer.model)
    trainer.save_model()
    trainer.save_state()
    write_training_metadata(trainer, stage, config.model, **facts(config))
