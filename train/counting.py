"""FLOPs and memory of a training step, counted on the meta device: shapes are computed, numbers are not.

The step runs as it would on a GPU, with autograd, activation checkpointing and mixed precision, so that what is frozen
and what is computed again are counted as they happen. `torch.utils.flop_counter` counts; this file says which part of
the model each operation belongs to, and how much memory is alive.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten
OTHER = "other"
RECOMPUTE = "_gradient_checkpointing_func"
"""The attribute of transformers' and diffusers' modules that computes a layer again in the backward pass."""
KINDS = ("convolution", "matmul", "attention")

_HALF_PRECISION = {  # of CUDA's autocast, those that the models here use
    *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.scaled_dot_product_attention, torch.matmul, torch.mm, torch.bmm),
    *(torch.addmm, torch.baddbmm, torch.einsum, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.bmm),
}
_FULL_PRECISION = {
    *(F.layer_norm, F.group_norm, F.softmax, F.log_softmax, F.cross_entropy, F.mse_loss, F.l1_loss),
    *(torch.softmax, torch.Tensor.softmax, torch.pow, torch.Tensor.pow, torch.rsqrt, torch.exp, torch.Tensor.sum),
}


@dataclass
class PartCount:
    """FLOPs of one part of the model in one step, by kind of operation.

    Recomputation by activation checkpointing belongs to the backward pass. A multiplication with its addition counts
    as two.
    """

    forward: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    backward: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))

    def total(self) -> int:
        return sum(self.forward.values()) + sum(self.backward.values())

    def kinds(self) -> dict[str, int]:
        """FLOPs of both passes by kind of operation."""
        return {kind: self.forward[kind] + self.backward[kind] for kind in KINDS}


@dataclass
class StepCount:
    """What one forward and backward pass costs.

    Args:
        parts: FLOPs by part, in the order in which they are computed.
        peak_bytes: The most bytes of activations, inputs and passing results that are alive at once. Weights and the
            gradients of weights are not among them.
        peak_at: The part and the pass in which that is.
    """

    parts: dict[str, PartCount]
    peak_bytes: int
    peak_at: str

    def total(self) -> int:
        """FLOPs of the step."""
        return sum(part.total() for part in self.parts.values())


def count_step(
    loss: Callable[[], torch.Tensor],
    parts: Mapping[str, nn.Module],
    models: Sequence[nn.Module],
    bf16: Sequence[nn.Module] = (),
    num_labels: int = 0,
    backward: bool = True,
) -> StepCount:
    """Counts one forward and backward pass of `loss()`.

    Args:
        loss: Computes the loss of one batch from models on the meta device.
        parts: Modules by name, one after the other in the forward pass; a `ModuleList`, which is not called itself,
            stands for its modules. What no module computes is `OTHER`.
        models: All models that `loss` uses; their weights are not counted as activations.
        bf16: Those of the models that compute under bfloat16 autocast.
        num_labels: Number of positions that boolean masks choose, because masks have no values on the meta device.
        backward: False counts the forward pass alone, without gradients.
    """
    for parameter in (parameter for model in models for parameter in model.parameters()):
        if backward and parameter.requires_grad:  # as with gradient accumulation: gradients exist from the start
            parameter.grad = torch.zeros_like(parameter)
    flops = FlopCounterMode(display=False)
    attribution = _Attribution(flops)
    memory = MemoryMode(models, lambda: f"{attribution.stack[-1]}, {attribution.phase}")
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(_as_on_a_gpu(model, model in bf16))
        modes = (MetaResults(), flops, memory, _MetaMode(num_labels), _FusedAttentionMode())
        for mode in (attribution.hooks(parts), *modes):
            stack.enter_context(mode)
        stack.enter_context(torch.set_grad_enabled(backward))
        value = loss()
        attribution.switch(OTHER, "backward")
        if backward:
            value.backward()
        attribution.switch(OTHER, "backward")
    for model in models:
        model.zero_grad(set_to_none=True)
    counted = {name: part for name, part in attribution.parts.items() if part.total()}
    return StepCount(counted, memory.peak, memory.peak_at)


@contextmanager
def _as_on_a_gpu(model: nn.Module, bf16: bool) -> Iterator[None]:
    """The model under autocast, also where activation checkpointing computes a second time.

    A `TorchFunctionMode` is off in a backward pass, so the second computation needs its own.
    """
    modes: list[Any] = []

    def enter(module, arguments):
        modes.append(MetaAutocast())
        modes[-1].__enter__()

    def leave(module, arguments, output):
        modes.pop().__exit__(None, None, None)

    @contextmanager
    def again():
        with _FusedAttentionMode(), MetaAutocast() if bf16 else nullcontext():
            yield

    def checkpointed(function, *args, **kwargs):
        return checkpoint(function, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again()), **kwargs)

    handles = [model.register_forward_pre_hook(enter), model.register_forward_hook(leave)] if bf16 else []
    for module in model.modules():
        if hasattr(module, RECOMPUTE):
            setattr(module, RECOMPUTE, checkpointed)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Attribution:
    """Which part and which pass the counted FLOPs belong to.

    Parts follow each other, so in the backward pass a part begins when the gradient of its output is there.
    """

    def __init__(self, flops: FlopCounterMode):
        self.flops = flops
        self.seen: defaultdict[Any, int] = defaultdict(int)
        self.stack: list[str] = [OTHER]
        self.phase = "forward"
        self.parts: dict[str, PartCount] = {}

    def switch(self, part: str, phase: str) -> None:
        """Books what was counted since the last call, and sets what the following belongs to."""
        counts = self.flops.flop_counts["Global"]
        booked = getattr(self.parts.setdefault(self.stack[-1], PartCount()), self.phase)
        for operation, total in counts.items():
            booked[_kind(str(operation))] += total - self.seen[operation]
            self.seen[operation] = total
        self.stack[-1], self.phase = part, phase

    @contextmanager
    def hooks(self, parts: Mapping[str, nn.Module]) -> Iterator[None]:
        handles = []
        called = [
            (name, module)
            for name, part in parts.items()
            for module in (part if isinstance(part, nn.ModuleList) else [part])
        ]
        for name, module in called:

            def before(module, arguments, name=name):
                self.switch(self.stack[-1], self.phase)
                self.stack.append(name)

            def after(module, arguments, output, name=name):
                self.switch(name, self.phase)
                self.stack.pop()
                for tensor in tree_leaves(dict(output) if isinstance(output, Mapping) else output):
                    if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                        tensor.register_hook(lambda gradient, name=name: self.switch(name, "backward"))

            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _kind(operation: str) -> str:
    if "conv" in operation:
        return "convolution"
    return "attention" if "attention" in operation else "matmul"


class MemoryMode(TorchDispatchMode):
    """Follows the bytes of tensors that are alive, on any device. `peak` is the most so far, `peak_at` says when.

    Args:
        models: Their weights, buffers and gradients are not counted.
        when: Called at each new peak for `peak_at`.
    """

    def __init__(self, models: Sequence[nn.Module], when: Callable[[], str] = str):
        super().__init__()
        self.alive = self.peak = 0
        self.peak_at, self._when = "", when
        self._known = WeakIdKeyDictionary()
        for model in models:
            for tensor in (*model.parameters(), *model.buffers()):
                self._known[tensor.untyped_storage()] = None
                if tensor.grad is not None:
                    self._known[tensor.grad.untyped_storage()] = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._known:
                    self._known[storage] = None
                    size = storage.nbytes()
                    self.alive += size
                    if self.alive > self.peak:
                        self.peak, self.peak_at = self.alive, self._when()
                    weakref.finalize(storage, self._free, size)
        return result

    def _free(self, size: int) -> None:
        self.alive -= size


class _MetaMode(TorchDispatchMode):
    """Answers what depends on values, which meta tensors do not have: no mask of attention hides anything, and a
    boolean index chooses `num_labels` positions."""

    def __init__(self, num_labels: int):
        super().__init__()
        self.num_labels = num_labels

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten._local_scalar_dense.default:
            return True
        if func in (aten.index.Tensor, aten.index_put.default, aten._index_put_impl_.default):
            args = (args[0], self._positions(args[1]), *args[2:])
        return func(*args, **(kwargs or {}))

    def _positions(self, indices):
        found: list[torch.Tensor | None] = []
        for index in indices:
            if index is not None and index.dtype == torch.bool:
                chosen = torch.empty(self.num_labels, dtype=torch.long, device=index.device)
                found += [chosen] * index.ndim
            else:
                found.append(index)
        return found


class MetaResults(TorchDispatchMode):
    """Gives an operation on meta tensors the shapes, strides and dtypes of an equal one before, in new tensors.

    The layers of a model repeat the same operations, and working out what results takes milliseconds. Operations that
    return or change their arguments' memory run each time.
    """

    def __init__(self):
        super().__init__()
        self._results: dict[Any, Any] = {}
        self._is_pure: dict[Any, bool] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in self._is_pure:
            values = (*func._schema.arguments, *func._schema.returns)
            self._is_pure[func] = not any(value.alias_info for value in values)
        if not self._is_pure[func]:
            return func(*args, **kwargs)
        key = (func, _described(args), _described(tuple(kwargs.items())))
        try:
            known = self._results.get(key)
        except TypeError:  # of an argument without a hash
            return func(*args, **kwargs)
        if known is not None:
            tensors = [torch.empty_strided(*sizes, dtype=dtype, device="meta") for *sizes, dtype in known[1]]
            return known[0](tensors)
        result = func(*args, **kwargs)
        several = isinstance(result, tuple | list)
        results = result if several else [result]
        tensors = [value for value in (*tree_leaves((args, kwargs)), *results) if isinstance(value, torch.Tensor)]
        if all(isinstance(value, torch.Tensor) for value in results) and all(tensor.is_meta for tensor in tensors):
            self._results[key] = (type(result) if several else _only, [_described(tensor) for tensor in results])
        return result


def _only(values: Sequence) -> Any:
    return values[0]


def _described(value: Any) -> Any:
    """A key for an argument: of a tensor its shape, strides and dtype."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, tuple | list):
        return tuple(map(_described, value))
    return type(value), value


class _FusedAttentionMode(TorchFunctionMode):
    """Scaled dot product attention as a GPU computes it, without a matrix of all scores in memory."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return _fused_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The same for every mask: the counter counts masked positions, too."""
    if key.shape[1] != query.shape[1]:  # grouped queries
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    gradients = any(tensor.requires_grad for tensor in (query, key, value))
    attend: Any = aten._scaled_dot_product_efficient_attention
    return attend(query, key, value, None, gradients, dropout_p, is_causal, scale=scale)[0]


class MetaAutocast(TorchFunctionMode):
    """CUDA's bfloat16 autocast for meta tensors, which `torch.autocast` does not know.

    Matrix products, convolutions and attention take bfloat16; norms, softmax, powers and losses take float32. A weight
    that is trained is cast once.
    """

    def __init__(self):
        super().__init__()
        self._weights: dict[int, torch.Tensor] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _HALF_PRECISION:
            args, kwargs = tree_map(self._half, (args, kwargs))
        elif func in _FULL_PRECISION:
            args, kwargs = tree_map(_full, (args, kwargs))
        return func(*args, **kwargs)

    def _half(self, value):
        if not (isinstance(value, torch.Tensor) and value.dtype == torch.float32):
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(torch.bfloat16)
        if id(value) not in self._weights:
            self._weights[id(value)] = value.to(torch.bfloat16)
        return self._weights[id(value)]


def _full(value):
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value
