"""The exponential moving average (EMA) of the trained weights."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback

AVERAGE_FILE = "average.safetensors"
"""File of a checkpoint: the average of each trained parameter, under its name."""


class AverageCallback(TrainerCallback):
    """Averages the trained parameters over the steps: `average += (1 - decay) * (parameter - average)`.

    The decay of step n is at most `(1 + n) / (10 + n)`, so that the first steps are soon forgotten. The model trains
    on with its own weights, which checkpoints contain, beside the average. At the end of the training, the average
    takes the place of the weights; evaluations and validations borrow it.

    Args:
        decay: 0 to 1, such as 0.9999.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.names: list[str] = []
        self.ema: Any = None
        self._scratch: dict[Any, torch.Tensor] = {}

    def start(self, model: nn.Module, checkpoint: str | None) -> None:
        """Starts with the parameters of a model, or goes on from a checkpoint that has an average."""
        from diffusers.training_utils import EMAModel  # imports peft

        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.ema = EMAModel([p for _, p in named], decay=self.decay)
        path = Path(checkpoint or "") / AVERAGE_FILE
        if checkpoint is not None and path.is_file():
            with safe_open(path, "pt") as file:
                self.ema.optimization_step = int(file.metadata()["steps"])
                for name, average in zip(self.names, self.ema.shadow_params, strict=True):
                    whole = file.get_tensor(name).to(average)
                    if isinstance(average, DTensor):
                        whole = distribute_tensor(whole, average.device_mesh, average.placements)
                    average.copy_(whole)
        self._allocate_scratch()

    def _allocate_scratch(self) -> None:
        """Allocates what an exchange needs, so that none can run out of memory: the largest tensor of each kind."""
        sizes: dict[Any, int] = {}
        for average in map(_local, self.ema.shadow_params):
            kind = average.device, average.dtype
            sizes[kind] = max(sizes.get(kind, 0), average.numel())
        self._scratch = {kind: torch.empty(size, device=kind[0], dtype=kind[1]) for kind, size in sizes.items()}

    def save(self, folder: str | Path, is_main_process: bool) -> None:
        """Writes the average into a checkpoint. All processes call this, because they may hold shards of it."""
        whole = {
            name: (average.full_tensor() if isinstance(average, DTensor) else average).cpu().contiguous()
            for name, average in zip(self.names, self.ema.shadow_params, strict=True)
        }
        if is_main_process:
            save_file(whole, Path(folder) / AVERAGE_FILE, metadata={"steps": str(self.ema.optimization_step)})

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.ema.step(self._parameters(model))

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.use(model)

    def use(self, model: nn.Module) -> None:
        """Puts the average in the place of the parameters."""
        self.ema.copy_to(self._parameters(model))

    @contextlib.contextmanager
    def borrowed(self, model: nn.Module) -> Iterator[None]:
        """Puts the average in the place of the parameters, and the parameters back afterwards, bit by bit.

        An exchange that fails is undone before its error goes on, so that weights and average are never mixed.
        """
        if self.ema is None:  # the training has not begun
            yield
            return
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a layer may still be gathered after a forward pass
        pairs = list(zip(map(_local, self._parameters(model)), map(_local, self.ema.shadow_params), strict=True))
        exchanged = 0
        try:
            for parameter, average in pairs:
                self._exchange(parameter, average)
                exchanged += 1
        except BaseException:
            for parameter, average in pairs[:exchanged]:
                self._exchange(parameter, average)
            raise

    def _exchange(self, parameter: torch.Tensor, average: torch.Tensor) -> None:
        scratch = self._scratch[average.device, average.dtype][: average.numel()].view(average.shape)
        scratch.copy_(parameter)
        parameter.copy_(average)
        average.copy_(scratch)

    def _parameters(self, model: nn.Module) -> Iterator[nn.Parameter]:
        parameters = dict(model.named_parameters())
        return (parameters[name] for name in self.names)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor; it shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
