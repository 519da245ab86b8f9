"""Progressive unfreezing: parts of a model that are trained from a later step on."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import TrainerCallback

from .sharding import initialise_fsdp


class UnfreezingCallback(TrainerCallback):
    """Freezes parts of a model until a step of the training.

    All parts are trainable (`requires_grad`) when the training starts, because optimiser, DDP and FSDP2 take the
    trainable parameters at that moment and see no later ones. They are frozen before the first step. The optimiser
    skips parameters without a gradient, so a part that is frozen neither changes nor decays.

    Args:
        schedule: `{step: names}`. A part whose parameters' names begin with one of the names, such as
            `"image_encoder.language_model.encoder."`, is trained after that many steps.

    Raises:
        ValueError: At the start of a training, if a name fits no trainable parameter.
    """

    def __init__(self, schedule: Mapping[int, Sequence[str]]):
        self.schedule = {step: tuple(names) for step, names in schedule.items()}
        self._later: dict[str, int] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not self._later:
            trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
            for step, prefixes in self.schedule.items():
                for prefix in prefixes:
                    found = [name for name in trainable if name.startswith(prefix)]
                    if not found:
                        raise ValueError(f"no trainable parameter has a name that begins with {prefix!r}")
                    self._later |= dict.fromkeys(found, step)
        initialise_fsdp(model)
        self._apply(model, state.global_step)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.schedule:
            self._apply(model, state.global_step)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._apply(model, max(self.schedule, default=0))

    def _apply(self, model: nn.Module, step: int) -> None:
        for name, parameter in model.named_parameters():
            if name in self._later:
                parameter.requires_grad_(step >= self._later[name])


def parse_unfreezing(text: str, allowed: Sequence[str]) -> dict[int, str]:
    """A schedule such as `"0: projector, 1000: all"` as `{step: value of trainable}`, in ascending order.

    Raises:
        ValueError: If it does not begin at step 0, a step is given twice, or a value is not one of `allowed`.
    """
    schedule: dict[int, str] = {}
    for entry in text.split(","):
        step, colon, value = (part.strip() for part in entry.partition(":"))
        if not colon or not step.isdecimal() or value not in allowed or int(step) in schedule:
            raise ValueError(
                f"unfreeze has {entry.strip()!r}; expected 'STEP: PART, STEP: PART', each step once, with parts "
                f"out of {tuple(allowed)}"
            )
        schedule[int(step)] = value
    if 0 not in schedule:
        raise ValueError(
            f"unfreeze is {text!r}; it has to say what is trained from step 0 on, as in '0: {allowed[0]}'"
        )
    return dict(sorted(schedule.items()))


def scheduled_unfreezing(
    model: nn.Module, text: str, allowed: Sequence[str], freeze: Callable[[Any, str], None]
) -> UnfreezingCallback:
    """The callback of a schedule of `parse_unfreezing`. The model's last parts are trainable afterwards.

    Args:
        freeze: Makes the parameters trainable that a value names, and freezes all others.

    Raises:
        ValueError: If a value names parameters that the next one does not.
    """
    before: set[str] = set()
    added: dict[int, list[str]] = {}
    for step, value in parse_unfreezing(text, allowed).items():
        freeze(model, value)
        names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        if before - names:
            raise ValueError(f"unfreeze is {text!r}; {value!r} at step {step} does not include what is trained before")
        added[step] = sorted(names - before)
        before = names
    return UnfreezingCallback({step: names for step, names in added.items() if step})
