"""Captioners of the tables differ only in what a table compares."""

import pytest
import torch

from vlv.miniature.paper.data_efficiency import CachedConditioning, compute_conditioning, freeze, train_from_pairs
from vlv.pipelines import generate_captions


def random_images(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("rate", "changes"), [(0.0, False), (1e-3, True)])
def test_the_encoder_has_its_own_learning_rate(rate, changes, captioner):
    captioner.model.text_encoder.requires_grad_(False)
    before = {name: weight.clone() for name, weight in captioner.state_dict().items()}
    labels = torch.full((64, 4), 5)
    train_from_pairs(captioner, random_images(64), labels, updates=2, encoder_learning_rate=rate)
    after = captioner.state_dict()
    assert torch.equal(before["model.query_tokens"], after["model.query_tokens"]) is not changes
    assert not torch.equal(before["language_projection.linear_1.weight"], after["language_projection.linear_1.weight"])
    assert torch.equal(
        before["model.text_encoder.final_layer_norm.weight"], after["model.text_encoder.final_layer_norm.weight"]
    )


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [
        ("projector", {"language_projection"}),
        ("projector+lm", {"language_projection", "language_model"}),
        (
            "all",
            {"language_projection", "language_model", "model.query_tokens", "model.projector", "model.image_encoder"},
        ),
    ],
)
def test_the_named_parts_are_trainable_and_no_others(trainable, expected, captioner):
    freeze(captioner, trainable)
    parts = {name for name, p in captioner.named_parameters() if p.requires_grad}
    assert {next((part for part in expected if name.startswith(part)), name) for name in parts} == expected


def test_an_unknown_name_of_trainable_parts_is_refused(captioner):
    with pytest.raises(ValueError, match=r"'everything'; expected 'projector', 'projector\+lm' or 'all'"):
        freeze(captioner, "everything")


def test_cached_conditioning_gives_the_captions_of_the_encoder(captioner, processor):
    images = random_images(3)
    expected = generate_captions(
        captioner, processor, pixel_values=processor(images=images).pixel_values, max_new_tokens=8
    )
    conditioning = compute_conditioning(captioner.model, images, batch_size=2)
    captioner.model = CachedConditioning()
    assert generate_captions(captioner, processor, caption_embeds=conditioning, max_new_tokens=8) == expected
    assert len(set(expected)) > 1  # so that they depend on the image
