"""A static cache and compiled models write the captions of the plain model."""

import copy

import pytest
import torch
from transformers import StaticCache

from vlv.captioning.acceleration import accelerate
from vlv.captioning.batches import Batch
from vlv.captioning.captioner import Captioner, CaptionSettings
from vlv.errors import UserError

PIXELS = {"pixel_values": torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))}


def captions(model, processor, acceleration, **settings) -> list[list[str]]:
    chosen = CaptionSettings(max_new_tokens=6, **settings)
    return Captioner(model, processor, chosen, acceleration=acceleration).caption(Batch([], PIXELS, []))


def test_a_static_cache_writes_the_same_ids(captioner, processor):
    acceleration = accelerate(captioner, static_cache=True)
    length = {"max_new_tokens": 6, "min_new_tokens": 6}
    written = captioner.generate(**PIXELS, **length, **acceleration, return_dict_in_generate=True)
    assert isinstance(written.past_key_values, StaticCache)
    assert torch.equal(written.sequences, captioner.generate(**PIXELS, **length))
    for settings in ({}, {"num_beams": 2}, {"prompt": "a small"}):
        expected = captions(captioner, processor, {}, **settings)
        assert captions(captioner, processor, acceleration, **settings) == expected


@pytest.mark.slow
def test_compiled_models_write_the_same_captions(captioner, processor):
    model, graphs = copy.deepcopy(captioner), []

    def backend(graph: torch.fx.GraphModule, example_inputs: list, **options):
        graphs.append(graph)
        return graph.forward

    acceleration = accelerate(model, compiled=True, backend=backend)
    assert acceleration["cache_implementation"] == "static"
    assert captions(model, processor, acceleration) == captions(captioner, processor, {})
    assert model.model.get_encoder("image")._compiled_call_impl is not None
    assert model.language_model._compiled_call is not None  # by which `generate` writes a token
    number = len(graphs)
    assert number > 2  # that of the check, of the tower, and of the step
    captions(model, processor, acceleration)
    assert len(graphs) == number


def test_what_cannot_be_accelerated_is_named(captioner, monkeypatch):
    assert accelerate(captioner) == {}
    with pytest.raises(UserError, match=r"--compile does not work on cpu: .*absent.*; leave it out"):
        accelerate(captioner, compiled=True, backend="absent")
    monkeypatch.setattr(type(captioner.language_model), "_is_stateful", True)
    with pytest.raises(UserError, match=r"--static-cache: .* has no static cache; leave it out"):
        accelerate(captioner, static_cache=True)
