"""Evaluation while training: a loss of samples that are not trained on, the same noise each time."""

import contextlib
import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from .data import TrainingDataset
from .data.streaming import GOLDEN_RATIO
from .meters import QUARTILES, Means


class EvaluationSet(Dataset):
    """A data set whose items have their `place`, which decides their noise.

    Args:
        dataset: Of items with `image`, and `caption` for stage 2.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return {**self.dataset[place], "place": place}


def find_evaluation_set(config: Any, dataset: Any, load: Callable[..., TrainingDataset], **options) -> Any:
    """The evaluation data that a configuration names, or what `dataset` holds back; None without any.

    Args:
        dataset: The training data.
        load: `load_images` or `load_pairs`.
        options: Further arguments of `load`.
    """
    source = getattr(config, "eval_images", None) or getattr(config, "eval_pairs", None)
    if source is None:
        found = getattr(dataset, "held_back", None)
        if found is None and config.eval_strategy != "no":
            name = "eval_images" if hasattr(config, "eval_images") else "eval_pairs"
            raise ValueError(
                f"eval_strategy is {config.eval_strategy.value!r}, but there is no evaluation data; give --{name} or "
                "--eval_share, or leave eval_strategy out"
            )
        return found
    plain = {"streaming": False, "random_crop": False, "horizontal_flip": False, "eval_share": 0.0}
    return load(source, **{**config.data_options(), **options, **plain})


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """Restores the random numbers of torch, numpy and Python afterwards."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def seeded_generators(*seed: int, places: Any) -> list[torch.Generator]:
    """A random generator for each of `places`, which depends on `seed` and the place alone."""
    seeds = [np.random.SeedSequence([*seed, place]).generate_state(1, np.uint64)[0] for place in places]
    return [torch.Generator().manual_seed(int(value)) for value in seeds]


def spread_timesteps(places: Any, first: int, last: int) -> torch.Tensor:
    """Timesteps from `first` to `last`, both included: of consecutive places they cover the range evenly.

    Returns:
        `(len(places),)`, int64, on the CPU.
    """
    shares = torch.tensor([(0.5 + place * GOLDEN_RATIO) % 1.0 for place in places], dtype=torch.float64)
    return (first + shares * (last + 1 - first)).long().clamp(max=last)


class EvaluationMixin(Trainer):
    """Evaluates an `EvaluationSet`. It changes neither the training's random numbers nor its losses.

    Every sample counts once, whatever the batches and the number of processes.
    """

    data_collator: Any
    _evaluation: Means | None = None
    _evaluated_batches = 0

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        args: Any = self.args
        collator: Any = self.data_collator
        drop_last = args.dataloader_drop_last
        self.data_collator, args.dataloader_drop_last = copy.copy(collator), False  # a collator has a memory
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator, args.dataloader_drop_last = collator, drop_last

    def _get_eval_sampler(self, eval_dataset: Any) -> SequentialSampler:
        """The order of the evaluation set, also where the training groups by length."""
        return SequentialSampler(eval_dataset)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        with kept_random_state():
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        self._evaluation, self._evaluated_batches = Means(("loss", *QUARTILES), self.args.device), 0
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._evaluation.read(self.accelerator)
        metrics: Any = output.metrics
        metrics.pop(f"{metric_key_prefix}_model_preparation_time", None)
        metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None) -> tuple:
        places = inputs.pop("places")
        for name in ("names", "num_skipped", "skipped"):
            inputs.pop(name, None)
        args: Any = self.args
        batch = self._evaluated_batches * args.world_size + args.process_index
        self._evaluated_batches += 1
        # The last batches are filled up with samples from the beginning, so that all processes have equally many.
        counted = torch.tensor([place >= batch * args.eval_batch_size for place in places], device=args.device)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.evaluate_batch(model, inputs, places, counted)
        return loss.detach(), None, None

    def evaluate_batch(
        self, model: Any, inputs: dict[str, Any], places: list[int], counted: torch.Tensor
    ) -> torch.Tensor:
        """The mean loss of a batch. Adds the losses of the samples that are counted to `self._evaluation`.

        Args:
            places: Of the samples in the evaluation set.
            counted: `(B,)`, bool.
        """
        raise NotImplementedError
