"""Settings that both stages share."""

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments

from .data import describe_sources
from .optimisers import check_optimiser
from .trackers import check_trackers
from .unfreezing import parse_unfreezing

RENAMED_TRAINABLE = {"decoder": "query_decoder", "projector+lm+decoder": "projector+lm+query_decoder"}
"""Former values of `trainable`, and their present names."""

SETTINGS_WITHOUT_EFFECT_ON_THE_RESULT = {
    *("export_decoder", "merge_lora_checkpoints", "cache_moments", "cache_vision_features"),
    *("cache_conditioning", "conditioning_dtype", "packing", "save_only_trainable"),
    *("accept_changes", "overwrite_output_dir", "output_dir", "validation_steps", "num_validation_images"),
    *("save_steps", "logging_steps", "dataloader_num_workers", "remove_unused_columns", "report_to", "disable_tqdm"),
    *("gradient_checkpointing", "diffusion_gradient_checkpointing", "encoder_activation_checkpointing"),
    *("language_model_activation_checkpointing", "channels_last", "compile_blocks", "shard_diffusion_model"),
    *("image_root", "on_bad_caption", "max_bad_share"),
    *("eval_images", "eval_pairs", "per_device_eval_batch_size", "logging_nan_inf_filter", "stop_loss_factor"),
    *("dry_run", "cache_rewards", "reward_batch_size"),
}
NUM_WORKERS = 4
"""Workers of a data loader by default; torch warns of more than there are CPUs."""
CACHES = ("cache_moments", "cache_vision_features", "cache_conditioning")
SETTINGS_OF_TRAINING_ARGUMENTS = (
    *("seed", "data_seed", "bf16", "fp16", "optim", "optim_args", "adam_beta1", "adam_epsilon", "max_grad_norm"),
    *("lr_scheduler_kwargs", "warmup_steps", "gradient_accumulation_steps", "train_sampling_strategy"),
    *("dataloader_drop_last", "world_size"),
)
"""Inherited settings that change the result."""


@dataclass
class StageConfig(TrainingArguments):
    """Settings of both stages: data, trainable parts, and the paper's optimiser (VLV paper, sec. 4.1).

    Raises:
        ValueError: If a setting has a value that the stage cannot use, or two settings contradict each other.
    """

    TRAINABLE: ClassVar[tuple[str, ...]] = ()
    RECIPES: ClassVar[tuple[str, ...]] = ()
    """Names of the stage's recipes in `configs`, as patterns."""

    split: str = field(default="train", metadata={"help": "Split of the data set."})
    image_column: str = field(
        default="image", metadata={"help": "Image column of the data set, the parquet or the .jsonl file."}
    )
    image_root: str | None = field(
        default=None,
        metadata={"help": "Folder that image paths in lists and tables start from; by default that of their file."},
    )
    on_bad_image: str = field(
        default="skip", metadata={"help": "Unreadable images: 'skip' (with a message, and counted) or 'error'."}
    )
    max_bad_share: float = field(
        default=0.01,
        metadata={
            "help": "The run stops when more than this share of an epoch's images, and of 1000 images, is unreadable; "
            "0: at the first, 1: never."
        },
    )
    random_crop: bool = field(
        default=False,
        metadata={"help": "Crop at a random place, drawn anew each epoch, instead of in the middle (pre_crop_size)."},
    )
    horizontal_flip: bool = field(
        default=False,
        metadata={"help": "Mirror half of the images, drawn anew each epoch. Captions keep their 'left' and 'right'."},
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read data sets of the Hub while training instead of downloading them first. Needs max_steps; the "
            "order of shards is shuffled, and no sample within a shard. Weights of sources are shares of the samples."
        },
    )
    cache_vision_features: str | None = field(
        default=None,
        metadata={
            "help": "Folder of a cache for small runs: of each image the features that the frozen vision tower gives, "
            "1.2 MB an image of 768 pixels in bf16, 2.4 MB in float32. What is missing is computed before the "
            "training, once; then the vision tower does not run."
        },
    )
    eval_share: float = field(
        default=0.0,
        metadata={
            "help": "Share of the training data, such as 0.02, that is not trained on but evaluated; drawn by seed."
        },
    )
    trainable: str = field(default="all", metadata={"help": "Which parts are trained."})
    ema_decay: float = field(
        default=0.0,
        metadata={
            "help": "Above 0, such as 0.9999: average the trained weights over the steps (EMA). The average becomes "
            "the trained model; the last checkpoint has the weights themselves."
        },
    )
    encoder_activation_checkpointing: bool = field(
        default=False,
        metadata={"help": "Recompute the activations of the image encoder and the text encoder to save memory."},
    )
    compile_blocks: bool = field(
        default=False,
        metadata={
            "help": "Compile the repeated layers of all models with torch.compile; the first step takes minutes."
        },
    )
    validation_steps: int = field(
        default=1000, metadata={"help": "Write validation samples every this many steps; 0: never."}
    )
    num_validation_images: int = field(default=8, metadata={"help": "Number of validation samples."})

    per_device_eval_batch_size: int | None = field(
        default=None, metadata={"help": "Batch size of the evaluation; by default that of the training."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Without effect: a loss that is not finite stops the run."}
    )
    stop_loss_factor: float = field(
        default=0.0,
        metadata={
            "help": "Above 0, such as 10: stop the run when the loss exceeds so many times the median of the last 100 "
            "steps. A loss that is not finite stops it in any case."
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Build everything, run two steps and one save in a temporary folder, print the plan of the run, "
            "and leave output_dir as it is."
        },
    )
    save_only_trainable: bool = field(
        default=False,
        metadata={
            "help": "Checkpoints hold only the tensors that are trained, beside the optimiser's state; resuming reads "
            "the rest from the models that the run started from. The end saves a complete model in any case. By "
            "default each checkpoint is one, too."
        },
    )
    accept_changes: bool = field(
        default=False,
        metadata={"help": "Go on from a checkpoint though settings that change the result differ from its own."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start anew; an earlier run in output_dir is renamed to OUTPUT_DIR-old-N."}
    )

    num_train_epochs: float = field(
        default=0, metadata={"help": "Passes over the data; if set, it replaces max_steps."}
    )
    adam_beta2: float = field(default=0.99, metadata={"help": "Beta2 of AdamW."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})
    save_steps: float = field(default=10_000, metadata={"help": "Save a checkpoint every this many steps."})
    logging_steps: float = field(default=50, metadata={"help": "Log every this many steps."})
    dataloader_num_workers: int | None = field(
        default=None,
        metadata={
            "help": f"Processes that read and prepare images; by default {NUM_WORKERS}, or one for each CPU where "
            "there are fewer."
        },
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay false: the collator needs all columns."}
    )
    report_to: str = field(default="none", metadata={"help": "For example 'trackio', 'tensorboard' or 'wandb'."})
    disable_tqdm: bool | None = field(
        default=None,
        metadata={"help": "Log lines instead of a progress bar; by default where stderr is not a terminal."},
    )
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Recompute the activations of all parts of the model (not of the denoiser) to save memory. Same "
            "as activation_checkpointing.",
            "nargs": "?",
            "const": True,
        },
    )

    def __post_init__(self):
        settings: Any = self
        if settings.disable_tqdm is None:
            settings.disable_tqdm = not sys.stderr.isatty()
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = min(NUM_WORKERS, _usable_cpus())
        for name in ("checkpointing", "checkpointing_kwargs"):
            if getattr(self, f"activation_{name}") is None:  # the new name; with the old one alone transformers warns
                setattr(self, f"activation_{name}", getattr(self, f"gradient_{name}"))
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = settings.per_device_train_batch_size
        if settings.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end does not work here: the end of a run saves its last weights; leave it out, "
                "evaluate the checkpoints, and name the best one as --model"
            )
        self._set_evaluation()
        super().__post_init__()
        check_trackers(settings.report_to)
        if not torch.accelerator.is_available():  # torch warns, and pins nothing
            self.dataloader_pin_memory = False
        if self.trainable in RENAMED_TRAINABLE:
            raise ValueError(f"trainable {self.trainable!r} was renamed to {RENAMED_TRAINABLE[self.trainable]!r}")
        if self.trainable not in self.TRAINABLE:
            raise ValueError(f"trainable is {self.trainable!r}; expected one of {self.TRAINABLE}")
        if getattr(self, "unfreeze", None) is not None:
            self._set_unfreezing()
        steps: int = settings.max_steps
        if self.num_train_epochs:
            default_steps = next(f.default for f in fields(self) if f.name == "max_steps")
            if steps not in (-1, default_steps):
                raise ValueError(
                    f"max_steps is {steps} and num_train_epochs is {self.num_train_epochs}; give one of them"
                )
            self.max_steps = -1
        elif steps < 1:
            raise ValueError(f"max_steps is {steps}; give a number of steps, or num_train_epochs")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "max_caption_tokens"):
            if getattr(self, name, 1) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; expected a whole number from 0 to 2**32 - 1")
        if not 0 <= self.stop_loss_factor < float("inf"):
            raise ValueError(f"stop_loss_factor is {self.stop_loss_factor}; expected 0 (off) or a number such as 10")
        for name in ("images", "pairs", "eval_images", "eval_pairs"):
            if getattr(self, name, None) is not None:
                setattr(self, name, describe_sources(getattr(self, name)))
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share is {self.max_bad_share}; expected a share of images, 0 to 1")
        for cache in CACHES:
            for name in ("random_crop", "horizontal_flip", "streaming"):
                if getattr(self, cache, None) is not None and getattr(self, name):
                    why = "does not know the images" if name == "streaming" else "changes the images in each epoch"
                    raise ValueError(f"{cache} does not work with {name}, which {why}; leave one of them out")
        if self.streaming and steps < 1:
            raise ValueError("streaming needs max_steps: the number of samples is not known before they are read")
        strategies = ("random", "sequential", *(("group_by_length",) if hasattr(self, "pairs") else ()))
        if settings.train_sampling_strategy not in strategies:
            raise ValueError(
                f"train_sampling_strategy is {settings.train_sampling_strategy!r}; expected one of {strategies}"
            )
        if self.streaming and settings.train_sampling_strategy == "group_by_length":
            raise ValueError(
                "train_sampling_strategy 'group_by_length' does not work with streaming, which does not know the "
                "captions before they are read; leave one of them out"
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {self.label_smoothing_factor}; it must be 0, because both stages have "
                "their own losses"
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; expected 0 (off) to 1, such as 0.9999")
        check_optimiser(str(getattr(settings.optim, "value", settings.optim)))
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be false: the collator needs columns that the model does not")

    def _set_evaluation(self) -> None:
        """Turns evaluation on where there is data for it. Raises `ValueError` if settings contradict each other."""
        settings: Any = self
        own = next((name for name in ("eval_images", "eval_pairs") if getattr(self, name, None) is not None), None)
        if not 0 <= self.eval_share < 1:
            raise ValueError(f"eval_share is {self.eval_share}; expected a share of the data, 0 to 1")
        if own is not None and self.eval_share:
            raise ValueError(f"{own} and eval_share are given; leave one of them out")
        strategy = getattr(settings.eval_strategy, "value", settings.eval_strategy)
        if strategy == "no" and (own is not None or self.eval_share):
            settings.eval_strategy = "steps"
            settings.eval_steps = settings.eval_steps or self.validation_steps or 1000

    def _set_unfreezing(self) -> None:
        """Sets `trainable` to the last value of `unfreeze`. Raises `ValueError` if that contradicts it."""
        schedule = parse_unfreezing(getattr(self, "unfreeze"), self.TRAINABLE)  # noqa: B009 (of the stages)
        last = schedule[max(schedule)]
        default = next(f.default for f in fields(self) if f.name == "trainable")
        if self.trainable not in (default, last):
            raise ValueError(f"trainable is {self.trainable!r}, but unfreeze ends with {last!r}; leave trainable out")
        self.trainable = last

    def data_options(self) -> dict[str, Any]:
        """Options of `load_images` and `load_pairs` besides the source."""
        names = ("split", "image_column", "image_root", "streaming", "random_crop", "horizontal_flip", "eval_share")
        return {name: getattr(self, name) for name in names} | {
            "seed": self.seed if self.data_seed is None else self.data_seed,
            "shuffle": getattr(self, "train_sampling_strategy") != "sequential",  # noqa: B009 (of TrainingArguments)
        }

    def result_settings(self) -> dict[str, Any]:
        """The settings that change the result of a training, as JSON values."""
        own = {
            name
            for base in type(self).__mro__
            if issubclass(base, StageConfig)
            for name in vars(base)["__annotations__"]
        }
        names = (own - {"TRAINABLE", "RECIPES"} - SETTINGS_WITHOUT_EFFECT_ON_THE_RESULT) | set(
            SETTINGS_OF_TRAINING_ARGUMENTS
        )
        values = self._values(names)
        return values | self.rounding_caches()

    def other_settings(self) -> dict[str, Any]:
        """Settings that a run may change at any time without another result, as JSON values."""
        names = SETTINGS_WITHOUT_EFFECT_ON_THE_RESULT - {"accept_changes", "overwrite_output_dir", "output_dir"}
        return self._values(name for name in names - set(self.rounding_caches()) if hasattr(self, name))

    def rounding_caches(self) -> dict[str, bool]:
        """The caches that would change the result, because they round what they store, and whether they are in use.

        Vision features have the precision of the training.
        """
        half = getattr(self, "bf16") or getattr(self, "fp16")  # noqa: B009 (of TrainingArguments)
        return {"cache_vision_features": self.cache_vision_features is not None} if half else {}

    def _values(self, names: Iterable[str]) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in sorted(names)}
        return {name: getattr(value, "value", value) for name, value in values.items()}


def _usable_cpus() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def same_command(config: Any) -> str:
    """The command that goes on with an interrupted run, for a message."""
    return "the same command" + (" without overwrite_output_dir" if config.overwrite_output_dir else "")
