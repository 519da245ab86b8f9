"""What a training costs before it starts: FLOPs, hours, price and memory, from its configuration alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .counting import StepCount, count_step
from .hardware import Gpu
from .meta_models import MetaStep, build_step
from .meta_rounds import SAMPLING, RoundCount
from .parsing import parse_config
from .stage1_trainer import Stage1Config
from .stage2_trainer import Stage2Config
from .stage3_config import Stage3Config

UTILIZATION = 0.35
"""Share of a card's peak speed that a training reaches: MLPerf's Stable Diffusion training on an H100 has 0.34."""
SECONDS_PER_LAYER = 0.0008
"""Of writing a token, whatever the number of captions: 300 greedy tokens of 16 images by Qwen2.5-3B, which has 36
layers, take 8.7 s on an H200 (benchmarks/gpu.md). Launches of kernels take that time, not arithmetic."""
PRICE = 2.5  # dollars for a GPU and an hour

BYTES_PER_TRAINED_WEIGHT = {  # of the optimiser's state, by a part of its name
    "4bit": 1,
    "8bit": 2,
    "adafactor": 0,  # rows and columns alone
    "sgd": 0,
    "lion": 4,
    "adagrad": 4,
    "rmsprop": 4,
}


@dataclass
class Memory:
    """Bytes on one card. `total` is a bound: it assumes that all states exist when the most activations are alive.

    Counted: weights, gradients, optimiser and activations by the storage of their tensors. With several cards, DDP's
    buckets are a second copy of the gradients. Not counted: the CUDA context, libraries' workspaces and fragmentation,
    together often 1 to 3 GB.
    """

    frozen_weights: int
    trained_weights: int
    gradients: int
    optimizer: int
    averaged_weights: int
    ddp_buckets: int
    activations: int
    activations_peak_at: str

    def total(self) -> int:
        return (
            self.frozen_weights
            + self.trained_weights
            + self.gradients
            + self.optimizer
            + self.averaged_weights
            + self.ddp_buckets
            + self.activations
        )


@dataclass
class RoundCost:
    """What a round of stage 3 computes before it trains.

    Args:
        images: Of the round, on all cards.
        captions: Sampled of an image.
        count: FLOPs of an image, and memory.
        seconds: For an image on a card, by part.
    """

    rounds: int
    images: int
    captions: int
    count: RoundCount
    seconds: dict[str, float]

    def hours(self, count: int) -> float:
        """Of all rounds on so many cards."""
        return self.rounds * self.images * sum(self.seconds.values()) / count / 3600

    def to_dict(self, count: int) -> dict[str, Any]:
        """All figures as JSON values, for so many cards."""
        return {
            "rounds": self.rounds,
            "images": self.images,
            "captions_per_image": self.captions,
            "denoiser_passes_per_image": self.count.passes,
            "tflop_per_image": {name: part.total() / 1e12 for name, part in self.count.parts.items()},
            "seconds_per_image": self.seconds,
            "hours_of_all_rounds": self.hours(count),
            "cache_bytes": self.count.cache_bytes,
        }


@dataclass
class Estimate:
    """The cost of a training.

    Args:
        step: FLOPs of one forward and backward pass of a batch on one card.
        batch: Images of such a batch.
        seconds: Of such a pass, by part.
        accumulation: Passes before each optimiser step.
        trained, frozen: Numbers of parameters.
        round: Of stage 3: sampling and scoring, which come before the steps of each round.
    """

    stage: int
    gpu: Gpu
    count: int
    price: float
    utilization: dict[str, float]
    precision: dict[str, str]
    steps: int
    batch: int
    accumulation: int
    step: StepCount
    seconds: dict[str, float]
    memory: Memory
    trained: int
    frozen: int
    round: RoundCost | None = None
    notes: list[str] = field(default_factory=list)

    def images(self) -> int:
        """Images of the complete training."""
        return self.steps * self.batch * self.accumulation * self.count

    def hours(self) -> float:
        steps = self.steps * self.accumulation * sum(self.seconds.values()) / 3600
        return steps + (self.round.hours(self.count) if self.round is not None else 0.0)

    def gpu_hours(self) -> float:
        return self.hours() * self.count

    def dollars(self) -> float:
        return self.gpu_hours() * self.price

    def images_per_second(self) -> float:
        """Of all cards together."""
        return self.batch * self.count / sum(self.seconds.values())

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON values."""
        total = sum(self.seconds.values())
        return {
            **({} if self.round is None else {"round": self.round.to_dict(self.count)}),
            "stage": self.stage,
            "gpu": self.gpu.name,
            "count": self.count,
            "steps": self.steps,
            "images_per_step": self.batch * self.accumulation * self.count,
            "images": self.images(),
            "parameters": {"trained": self.trained, "frozen": self.frozen},
            "tflop_per_image": {
                name: {
                    "forward": sum(part.forward.values()) / self.batch / 1e12,
                    "backward": sum(part.backward.values()) / self.batch / 1e12,
                    "precision": self.precision[name],
                    "utilization": self.utilization[name],
                    "share_of_time": self.seconds[name] / total,
                }
                for name, part in self.step.parts.items()
            },
            "tflop_per_image_total": self.step.total() / self.batch / 1e12,
            "images_per_second": self.images_per_second(),
            "seconds_per_step": total * self.accumulation,
            "hours": self.hours(),
            "gpu_hours": self.gpu_hours(),
            "price_per_gpu_hour": self.price,
            "dollars": self.dollars(),
            "memory_bytes": {**vars(self.memory), "total": self.memory.total()},
            "notes": self.notes,
        }


@dataclass
class Counted:
    """A step on the meta device and what it costs."""

    step: MetaStep
    count: StepCount


def count_training_step(config: Stage1Config | Stage2Config, **kwargs: Any) -> Counted:
    """Builds the step of a configuration and counts it. The arguments are those of `meta_models.build_step`."""
    step = build_step(config, **kwargs)
    return Counted(step, _count(step))


def _count(step: MetaStep) -> StepCount:
    return count_step(step.loss, step.parts, step.models, step.bf16, step.num_labels)


def estimate(
    config: Stage1Config | Stage2Config,
    gpu: Gpu,
    count: int,
    *,
    counted: Counted | None = None,
    price: float = PRICE,
    utilization: float | Mapping[str, float] = UTILIZATION,
    samples: int | None = None,
    tf32: bool = False,
    **kwargs: Any,
) -> Estimate:
    """The cost of the training that a configuration describes. Needs neither weights nor a network nor a GPU.

    Validation, saving, waiting for data and communication are not counted.

    Args:
        gpu: See `hardware.find_gpu`.
        count: Number of cards; each has `per_device_train_batch_size` images.
        counted: From `count_training_step`; by default the step is counted here.
        price: Dollars for a card and an hour.
        utilization: Share of the card's peak that the operations reach, or a share by part, with `""` for the others.
        samples: Size of the data, which `num_train_epochs` needs; a round has no more images.
        tf32: Whether float32 matrix products use TF32.
        kwargs: Of `count_training_step`.

    Raises:
        ValueError: If a model is not known, the number of steps is open, or `utilization` names no part.
    """
    steps = _steps(config, config.per_device_train_batch_size * config.gradient_accumulation_steps * count, samples)
    shares = dict(utilization) if isinstance(utilization, Mapping) else {"": utilization}
    step = counted.step if counted else build_step(config, **kwargs)
    _check_utilization(shares, step)
    count_of_step = counted.count if counted else _count(step)
    parts = count_of_step.parts
    of_round = step.round.parts if step.round else {}
    names = [*parts, *of_round]
    precision = {name: step.precision.get(name, step.default_precision) for name in names}
    reached = {name: shares.get(name, shares.get("", UTILIZATION)) for name in names}
    seconds = {
        name: sum(
            flops / (gpu.peak(precision[name], kind, tf32) * reached[name]) for kind, flops in part.kinds().items()
        )
        for name, part in {**parts, **of_round}.items()
    }
    cost = None
    if isinstance(config, Stage3Config) and step.round is not None:
        own = {name: seconds.pop(name) for name in of_round}
        written = step.round.layer_steps * SECONDS_PER_LAYER / config.sample_batch_size
        own[SAMPLING] = max(own[SAMPLING], written)
        images = config.round_images if samples is None else min(config.round_images, samples)
        cost = RoundCost(config.rounds, images, config.num_captions, step.round, own)
    found = Estimate(
        stage=_stage_of(config),
        round=cost,
        gpu=gpu,
        count=count,
        price=price,
        utilization=reached,
        precision=precision,
        steps=steps,
        batch=config.per_device_train_batch_size,
        accumulation=config.gradient_accumulation_steps,
        step=count_of_step,
        seconds=seconds,
        memory=_memory(step, count_of_step, config, count),
        trained=_parameters(step, True),
        frozen=_parameters(step, False),
    )
    if found.memory.total() > gpu.memory * 1e9:
        found.notes.append(
            f"{found.memory.total() / 1e9:.0f} GB do not fit on a card of {gpu.memory:.0f} GB: halve "
            "per_device_train_batch_size and double gradient_accumulation_steps, or set activation_checkpointing"
            + (" and diffusion_gradient_checkpointing" if found.stage == 1 else "")
        )
    return found


def speed_estimate(counted: StepCount, rates: Mapping[str, Mapping[str, float]]) -> float:
    """Seconds of a counted step at measured speeds.

    Args:
        rates: FLOP/s by kind of operation, by part; those of `""` are for all other parts.
    """
    return sum(
        flops / rates.get(name, rates[""])[kind]
        for name, part in counted.parts.items()
        for kind, flops in part.kinds().items()
    )


def _stage_of(config: Any) -> int:
    return 1 if isinstance(config, Stage1Config) else 3 if isinstance(config, Stage3Config) else 2


def _check_utilization(shares: Mapping[str, float], step: MetaStep) -> None:
    known = [*step.parts, *(step.round.parts if step.round else ())]
    for name, share in shares.items():
        if name and name not in known:
            raise ValueError(f"utilization names the part {name!r}; expected one of {', '.join(known)}")
        if not 0 < share <= 1:
            raise ValueError(f"utilization is {share}; expected a share of the card's peak, above 0 and at most 1")


def _steps(config: Any, images: int, samples: int | None) -> int:
    if config.max_steps > 0:
        return config.max_steps
    if samples is None:
        raise ValueError(
            "num_train_epochs needs the number of images or pairs in the data: give --samples, or max_steps"
        )
    return math.ceil(config.num_train_epochs * math.ceil(samples / images))


def _parameters(step: MetaStep, trained: bool) -> int:
    return sum(p.numel() for model in step.models for p in model.parameters() if p.requires_grad == trained)


def _memory(step: MetaStep, counted: StepCount, config: Any, count: int) -> Memory:
    optimizer = str(getattr(config.optim, "value", config.optim))
    weights = dict.fromkeys((True, False), 0)
    for model in step.models:
        for parameter in model.parameters():
            weights[parameter.requires_grad] += parameter.nbytes
    peak, peak_at = counted.peak_bytes, counted.peak_at
    if step.round is not None and step.round.peak_bytes > peak:
        peak, peak_at = step.round.peak_bytes, step.round.peak_at
    state = next((size for name, size in BYTES_PER_TRAINED_WEIGHT.items() if name in optimizer), 8)
    return Memory(
        frozen_weights=weights[False],
        trained_weights=weights[True],
        gradients=weights[True],
        optimizer=state * _parameters(step, True),
        averaged_weights=weights[True] if config.ema_decay else 0,
        ddp_buckets=weights[True] if count > 1 else 0,
        activations=peak,
        activations_peak_at=peak_at,
    )


def find_stage(names: set[str]) -> int:
    """The stage whose settings these are.

    Raises:
        ValueError: If they are of two stages, or of none alone.
    """
    own = {
        stage: set(config.__dataclass_fields__)
        for stage, config in ((1, Stage1Config), (2, Stage2Config), (3, Stage3Config))
    }
    if names & (own[3] - own[1] - own[2]):
        return 3
    only = {1: names & (own[1] - own[2]), 2: names & (own[2] - own[1])}
    if bool(only[1]) == bool(only[2]):
        found = f"has settings of two stages ({min(only[1])}, {min(only[2])})" if only[1] else "fits several stages"
        raise ValueError(f"the configuration {found}; give --stage 1, 2 or 3")
    return 1 if only[1] else 2


def _has_stage(names: set[str], stage: int) -> bool:
    try:
        return find_stage(names) == stage
    except ValueError:
        return False


def recipe_beside(path: Path, model: str | None, program: str, stage: int = 1) -> Any:
    """The recipe of an earlier stage, in the folder of another recipe, that will make its `model`, by `output_dir`.

    Returns:
        The configuration; None if there is none.
    """
    config_class: Any = {1: Stage1Config, 2: Stage2Config}[stage]
    for other in sorted(path.parent.glob("*.y*ml")):
        try:
            settings = yaml.safe_load(other.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            continue
        if not isinstance(settings, dict) or not _has_stage(set(map(str, settings)), stage):
            continue
        if model is not None and settings.get("output_dir", config_class.output_dir) == model:
            return parse_config(config_class, [str(other), "--use_cpu", "true"], program)
    return None
