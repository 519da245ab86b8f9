"""Progressive unfreezing: parts of a model that are trained from a later step on."""

from collections.abc import Mapping, Sequence

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
