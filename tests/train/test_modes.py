"""Trainable parts are in training mode, frozen parts in evaluation mode, whatever trains the model."""

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from vlv.train import freeze_for_stage1, freeze_for_stage2, set_train_mode

from ..builders import assert_close_to_scale

LABELS = torch.tensor([[5, 6, 7, 3], [8, 3, -100, -100], [9, 10, 3, -100]])


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(7))


def test_frozen_parts_are_in_evaluation_mode(encoder):
    freeze_for_stage1(encoder, "transformer")
    set_train_mode(encoder)
    assert encoder.training and encoder.image_encoder.language_model.training
    assert not any(module.training for module in encoder.text_encoder.modules())
    assert not any(module.training for module in encoder.image_encoder.vision_tower.modules())


def test_a_frozen_encoder_adds_no_noise_to_what_is_trained_on_it(encoder):
    encoder.requires_grad_(False)
    classifier = torch.nn.Sequential(encoder, torch.nn.Linear(3, 3))
    set_train_mode(classifier)
    assert classifier.training and not any(module.training for module in classifier[0].modules())
    encoder.query_tokens.requires_grad_(True)
    set_train_mode(classifier)
    assert encoder.training and not encoder.image_encoder.training


def test_gradient_checkpointing_reaches_frozen_layers_that_gradients_pass(captioner, pixels):
    """With a trainable projection alone, gradients pass through all layers of the frozen language model."""
    freeze_for_stage2(captioner, "projector")

    def gradients() -> torch.Tensor:
        captioner.zero_grad()
        captioner(pixels, labels=LABELS).loss.backward()
        return captioner.language_projection.linear_1.weight.grad.clone()

    def count_forward_passes(layer) -> list[int]:
        calls = []
        layer.self_attn.register_forward_hook(lambda *arguments: calls.append(1))
        return calls

    layers = [m for m in captioner.language_model.modules() if isinstance(m, GradientCheckpointingLayer)]
    calls = count_forward_passes(layers[0])
    set_train_mode(captioner)
    expected = gradients()
    assert len(calls) == 1
    captioner.gradient_checkpointing_enable()
    set_train_mode(captioner)
    assert not captioner.model.image_encoder.training  # which has dropout
    assert_close_to_scale(gradients(), expected)
    assert len(calls) == 3  # one for the loss, then a forward and a recomputation
