"""Configuration of stage 3."""

import argparse
import os
from dataclasses import dataclass, field
from typing import Any

from vlv.pipelines.diffusion_score import NUM_PAIRS, TIMESTEP_RANGE

from .parsing import GatherAction
from .stage1_trainer import VAE_DTYPES
from .stage2_trainer import Stage2Config

METHODS = ("best_of_n", "grpo")
OF_STAGE_2 = ("language_model", "gguf_file", "replace_language_model", "load_in_4bit")
"""Settings that make a new captioner, which stage 3 cannot start from."""


def _unused(default: Any) -> Any:
    """A setting that is refused, and that `--help` lacks."""
    return field(default=default, metadata={"help": argparse.SUPPRESS})


@dataclass
class Stage3Config(Stage2Config):
    """Stage 3. A round samples captions of some images, scores them, and trains; other options are those of stage 2.

    Raises:
        ValueError: If a setting has a value that the stage cannot use, or two settings contradict each other.
    """

    RECIPES = ("stage3/*.yaml",)

    model: str | None = field(
        default=None, metadata={"help": "The captioner to start from, of stage 2: folder or repo id."}
    )
    language_model: str | None = _unused(None)
    gguf_file: str | None = _unused(None)
    replace_language_model: bool = _unused(False)
    load_in_4bit: bool = _unused(False)
    streaming: bool = _unused(False)
    num_train_epochs: float = _unused(0)
    random_crop: bool = _unused(False)
    horizontal_flip: bool = _unused(False)
    eval_share: float = _unused(0.0)
    images: str | None = field(
        default=None,
        metadata={
            "help": "Where the images are: a folder, a list (.jsonl, .json, .csv, .tsv), parquet or tar files, or a "
            "data set such as org/name; several as `a b`, in YAML as [a, b], without weights.",
            "nargs": "+",
            "action": GatherAction,
        },
    )
    pairs: str | None = field(
        default=None,
        metadata={
            "help": "Image-caption pairs that are mixed in, see pairs_share (best_of_n alone).",
            "nargs": "+",
            "action": GatherAction,
        },
    )
    pairs_share: float = field(default=0.25, metadata={"help": "With pairs: their share of what a round trains on."})
    diffusion_model: str | None = field(
        default=None,
        metadata={
            "help": "The frozen text-to-image model that scores captions: a diffusers folder or repo id. By default "
            "the one that `model` was trained with."
        },
    )
    diffusion_image_size: int | None = field(
        default=None,
        metadata={
            "help": "Side in pixels of the images for the diffusion model; by default pre_crop_size, and without a "
            "crop the diffusion model's own size."
        },
    )
    vae_dtype: str = field(
        default="float32", metadata={"help": "Precision of the autoencoder: 'float32' or 'bfloat16'."}
    )
    method: str = field(
        default="best_of_n",
        metadata={
            "help": "'best_of_n': train on the best caption of each image so far by the loss of stage 2; 'grpo': "
            "group-relative policy gradient on all samples of the round."
        },
    )
    rounds: int = field(default=4, metadata={"help": "Number of rounds."})
    round_images: int = field(default=5000, metadata={"help": "Images whose captions are sampled in a round."})
    round_steps: int = field(default=200, metadata={"help": "Optimiser steps of a round."})
    num_captions: int = field(default=8, metadata={"help": "Captions that are sampled of an image in a round."})
    temperature: float = field(default=1.0, metadata={"help": "Of the samples."})
    top_p: float = field(default=1.0, metadata={"help": "Below 1: sample from the likeliest tokens of this share."})
    sample_batch_size: int = field(
        default=16, metadata={"help": "Images on a device whose captions are sampled and scored together."}
    )
    max_caption_tokens: int = field(
        default=300, metadata={"help": "A sampled caption that does not end within so many tokens has no reward."}
    )
    buffer_rounds: int = field(
        default=0, metadata={"help": "best_of_n: train on the captions of the last so many rounds; 0: of all."}
    )
    reward_num_pairs: int = field(
        default=NUM_PAIRS,
        metadata={"help": "Pairs of timestep and noise of a score, so many passes of the denoiser a caption."},
    )
    reward_min_timestep: float = field(
        default=TIMESTEP_RANGE[0], metadata={"help": "Lowest timestep of a score, as a share of the schedule."}
    )
    reward_max_timestep: float = field(
        default=TIMESTEP_RANGE[1], metadata={"help": "Highest timestep of a score, as a share of the schedule."}
    )
    reward_batch_size: int = field(default=64, metadata={"help": "Most passes of the denoiser at once."})
    length_penalty: float = field(default=0.0, metadata={"help": "Taken from the reward for each word of a caption."})
    fluency_floor: float | None = field(
        default=None,
        metadata={
            "help": "A caption has no reward if the mean log-probability of its tokens is lower, by the language "
            "model of `model` without an image, such as -4; -1000 only measures it."
        },
    )
    cache_rewards: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the cache of rewards, which runs one after the other may share; by default output_dir."
        },
    )
    kl_weight: float = field(
        default=0.04, metadata={"help": "grpo: weight of the divergence from the start of the run."}
    )
    clip_range: float = field(
        default=0.2, metadata={"help": "grpo: how far the ratio of probabilities may be from 1 with an effect."}
    )

    output_dir: str = field(
        default="runs/stage3", metadata={"help": "Folder of checkpoints, rounds, samples and the trained model."}
    )
    trainable: str = field(
        default="projector+lm",
        metadata={
            "help": "'projector', 'projector+lm', 'projector+lm+query_decoder' (and Florence-2's decoder), 'all' (and "
            "its encoder), or 'all+vision'."
        },
    )
    max_steps: int = field(default=-1, metadata={"help": "Leave it out: it is rounds times round_steps."})
    save_steps: float = field(
        default=0,
        metadata={"help": "Save a checkpoint every this many steps, a divisor of round_steps; 0: each round."},
    )

    def __post_init__(self):
        steps = self.rounds * self.round_steps
        counts = ("rounds", "round_images", "round_steps", "sample_batch_size", "max_caption_tokens")
        for name in (*counts, "reward_num_pairs", "reward_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if self.max_steps not in (-1, steps) or self.num_train_epochs:
            name = "num_train_epochs" if self.num_train_epochs else "max_steps"
            raise ValueError(
                f"{name} is {getattr(self, name)}, but stage 3 has rounds times round_steps; leave it out"
            )
        self.max_steps = steps
        self.save_steps = self.save_steps or self.round_steps
        if self.save_steps < 1 or self.round_steps % self.save_steps:
            raise ValueError(
                f"save_steps is {self.save_steps:g}; expected a divisor of round_steps, {self.round_steps}, because a "
                "round begins from a checkpoint"
            )
        self._check_stage3()
        if self.method == "grpo":
            if self.packing:
                raise ValueError("packing does not work with grpo, which needs the logits of each row; leave it out")
            self.packing = False
        super().__post_init__()

    def _check_stage3(self) -> None:
        """Raises `ValueError` for settings of stage 3 that cannot be used."""
        settings: Any = self
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; expected one of {METHODS}")
        if self.num_captions < 2:
            raise ValueError(f"num_captions is {self.num_captions}; expected 2 or more, of which one can be better")
        if not 0 < self.temperature < float("inf") or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature is {self.temperature} and top_p {self.top_p}; expected a number above 0, and a share "
                "above 0 up to 1"
            )
        if not 0 <= self.reward_min_timestep <= self.reward_max_timestep <= 1:
            raise ValueError(
                f"reward_min_timestep is {self.reward_min_timestep} and reward_max_timestep "
                f"{self.reward_max_timestep}; expected shares of the schedule, such as 0.45 and 0.95"
            )
        if not 0 <= self.pairs_share < 1:
            raise ValueError(f"pairs_share is {self.pairs_share}; expected a share, 0 to below 1")
        if self.vae_dtype not in VAE_DTYPES:
            raise ValueError(f"vae_dtype is {self.vae_dtype!r}; expected one of {VAE_DTYPES}")
        if not 0 <= self.kl_weight < float("inf") or not 0 < self.clip_range < 1 or self.buffer_rounds < 0:
            raise ValueError(
                f"kl_weight is {self.kl_weight}, clip_range {self.clip_range} and buffer_rounds {self.buffer_rounds}; "
                "expected 0 or more, a number between 0 and 1, and 0 or more"
            )
        if not 0 <= self.length_penalty < float("inf"):
            raise ValueError(f"length_penalty is {self.length_penalty}; expected 0 or more, in units of the reward")
        if self.fluency_floor is not None and not float("-inf") < self.fluency_floor < 0:
            raise ValueError(
                f"fluency_floor is {self.fluency_floor}; expected a mean log-probability, below 0, such as -4"
            )
        if settings.stop_loss_factor and self.method == "grpo":
            raise ValueError(
                "stop_loss_factor compares a loss with earlier ones, and that of grpo lies around 0; leave it out"
            )
        if self.cache_rewards is not None and os.path.isfile(self.cache_rewards):
            raise ValueError(f"cache_rewards is {self.cache_rewards}, a file; expected a folder")
        if self.pairs is not None and self.method == "grpo":
            raise ValueError("pairs are mixed in by best_of_n alone; leave pairs out, or pass --method best_of_n")
        defaults = {"streaming": False, "random_crop": False, "horizontal_flip": False, "eval_share": 0.0}
        reasons = {
            "streaming": "reads images more than once",
            "eval_share": "has no captions to hold back: use eval_pairs",
        }
        for name, value in defaults.items():
            if getattr(self, name) != value:
                why = reasons.get(name, "scores images as they are")
                raise ValueError(f"{name} does not work with stage 3, which {why}; leave it out")
        if settings.train_sampling_strategy != "random":
            raise ValueError(
                f"train_sampling_strategy is {settings.train_sampling_strategy!r}, but each round chooses its samples "
                "and their order; leave it out"
            )
        for name in OF_STAGE_2:
            if getattr(self, name):
                raise ValueError(f"{name} belongs to stage 2; stage 3 starts from a captioner (--model ...)")
        if settings.dataloader_persistent_workers:
            raise ValueError("dataloader_persistent_workers does not work with stage 3: each round has other samples")
