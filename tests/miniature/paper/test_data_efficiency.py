"""What is compared differs in what it is meant to differ in."""

import pytest
import torch

from vlv.miniature.paper.data_efficiency import train_from_pairs


@pytest.mark.parametrize(("rate", "moves"), [(0.0, False), (1e-3, True)])
def test_the_encoder_learns_at_a_rate_of_its_own(rate, moves, captioner):
    captioner.model.text_encoder.requires_grad_(False)
    before = {name: weight.clone() for name, weight in captioner.state_dict().items()}
    pictures = torch.randint(0, 256, (64, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.full((64, 4), 5)
    train_from_pairs(captioner, pictures, labels, updates=2, encoder_learning_rate=rate)
    after = captioner.state_dict()
    assert torch.equal(before["model.query_tokens"], after["model.query_tokens"]) is not moves
    assert not torch.equal(before["language_projection.linear_1.weight"], after["language_projection.linear_1.weight"])
    assert torch.equal(
        before["model.text_encoder.final_layer_norm.weight"], after["model.text_encoder.final_layer_norm.weight"]
    )
