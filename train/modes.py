"""Training mode for the parts that are trained, evaluation mode for the frozen ones."""

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def set_train_mode(model: nn.Module) -> None:
    """Puts trainable parts of a model in training mode and frozen parts in evaluation mode.

    A frozen part in training mode would add the noise of its dropout and drop path to the parts that are trained (the
    authors' code does that).

    Layers with gradient checkpointing are an exception: transformers checkpoints a layer in training mode only, so
    frozen layers stay in training mode, where they have no dropout of their own. Their submodules are in evaluation
    mode all the same.
    """
    model.train()
    _eval_frozen_parts(model)
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing and not _has_dropout(layer):
            layer.training = True


def _eval_frozen_parts(module: nn.Module) -> tuple[bool, bool]:
    """Puts every module that has parameters, but none that is trainable, in evaluation mode, in one pass.

    Returns:
        Whether the module has parameters, and whether any of them is trainable.
    """
    own = list(module.parameters(recurse=False))
    has_parameters, trainable = bool(own), any(parameter.requires_grad for parameter in own)
    for child in module.children():
        child_has_parameters, child_trainable = _eval_frozen_parts(child)
        has_parameters, trainable = has_parameters or child_has_parameters, trainable or child_trainable
    if has_parameters and not trainable:
        module.eval()
    return has_parameters, trainable


def _has_dropout(layer: nn.Module) -> bool:
    """Whether a layer applies dropout itself, with a rate that it keeps as a number (BART's `dropout`)."""
    return any(isinstance(value, float) and value > 0 and "drop" in name for name, value in vars(layer).items())
