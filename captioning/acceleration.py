"""Options that make captions faster and leave them the same: a static cache, and compiled models."""

from typing import Any

from transformers import CompileConfig

from vlv import VLVForConditionalGeneration
from vlv.errors import UserError


def accelerate(
    model: VLVForConditionalGeneration, static_cache: bool = False, compiled: bool = False, backend: Any = "inductor"
) -> dict[str, Any]:
    """Prepares a model in place, and returns the arguments of its `generate` that make use of it.

    Args:
        static_cache: Whether keys and values of the language model get room for all tokens of a caption at once.
        compiled: Whether the vision tower, and the step that writes a token, are compiled. The step needs tensors of
            one size, and so `static_cache`, which it implies.
        backend: Of `torch.compile`: a name, or a function.

    Raises:
        UserError: If nothing can be compiled on the model's device, or its language model has no such cache.
    """
    if not (static_cache or compiled):
        return {}
    if getattr(model.language_model, "_is_stateful", False):
        option = "--compile" if compiled else "--static-cache"
        raise UserError(
            f"{option}: {type(model.language_model).__name__} keeps states besides keys and values, and has no static "
            "cache; leave it out"
        )
    static: dict[str, Any] = {"use_cache": True, "cache_implementation": "static"}
    if not compiled:
        return {**static, "disable_compile": True}
    from vlv.train.memory import check_compiler  # it imports the trainers, which captions do not need

    try:
        check_compiler(model.device, backend, "--compile")
    except ValueError as error:
        raise UserError(str(error)) from error
    model.model.get_encoder("image").compile(backend=backend)
    settings = CompileConfig(backend=backend)
    settings._compile_all_devices = True  # also on a CPU
    return {**static, "compile_config": settings}
