"""Which parameters each stage trains."""

from torch import nn

from vlv import VLVForConditionalGeneration, VLVModel
from vlv.modeling_vlv import examine_backbone


def freeze_for_stage1(model: VLVModel, trainable: str) -> None:
    """Makes the parameters that `trainable` names (see `Stage1Config`) trainable, and freezes all others.

    The query tokens and the projector are always trainable, the text encoder is always frozen.
    """
    model.requires_grad_(False)
    model.query_tokens.requires_grad_(True)
    model.projector.requires_grad_(True)
    if trainable == "query_decoder":
        _unfreeze_query_decoder(model)
    if trainable in ("transformer", "all"):
        _unfreeze_transformer(model)
    if trainable == "all":
        _unfreeze_vision(model)


def freeze_for_stage2(model: VLVForConditionalGeneration, trainable: str) -> None:
    """Makes the parameters that `trainable` names (see `Stage2Config`) trainable, and freezes all others.

    The language projection is always trainable. The query tokens, stage 1's projector and the text encoder are always
    frozen.
    """
    model.requires_grad_(False)
    model.language_projection.requires_grad_(True)
    if trainable != "projector":
        for parameter in model.language_model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())  # weights in 4 bits are stored as integers
    if trainable == "projector+lm+query_decoder":
        _unfreeze_query_decoder(model.model)
    if trainable in ("all", "all+vision"):
        _unfreeze_transformer(model.model)
    if trainable == "all+vision":
        _unfreeze_vision(model.model)


def trainable_names(model: nn.Module) -> set[str]:
    """The names of the parameters that are trained; tied ones have several."""
    return {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}


def _unfreeze_query_decoder(model: VLVModel) -> None:
    """Florence-2's decoder, without the word embeddings that it shares with the encoder.

    With a vision backbone: the query decoder, and the projection of the features that it reads.
    """
    model.get_query_decoder().requires_grad_(True)
    if model.config.query_decoder_config is None:
        model.image_encoder.language_model.shared.requires_grad_(False)
    else:
        model.get_image_projection().requires_grad_(True)


def _unfreeze_transformer(model: VLVModel) -> None:
    """Florence-2's encoder and decoder. Without a task prompt its word embeddings get no gradient and stay frozen.

    With a vision backbone there is the query decoder alone.
    """
    if model.config.query_decoder_config is not None:
        _unfreeze_query_decoder(model)
        return
    transformer = model.image_encoder.language_model
    transformer.requires_grad_(True)
    if not model.config.task_prompt_ids:
        transformer.shared.requires_grad_(False)


def _unfreeze_vision(model: VLVModel) -> None:
    """The vision tower and the projection of its features. Poolers and heads, which get no gradient, stay frozen."""
    model.get_image_projection().requires_grad_(True)
    tower = model.get_encoder("image")
    tower.requires_grad_(True)
    if model.config.query_decoder_config is not None:
        _, used = examine_backbone(model.config.image_encoder_config)
        for name, parameter in tower.named_parameters():
            parameter.requires_grad_(name in used)
