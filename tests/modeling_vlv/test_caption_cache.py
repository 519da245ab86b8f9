"""Beams and samples of an image read its prefix once, and write what each would write that reads it alone."""

import pytest
import torch
from transformers import AutoConfig, DynamicCache, Qwen2Config

from vlv import VLVForConditionalGeneration
from vlv.generation_vlv import CaptionCache

from ..builders import QUERIES, VOCABULARY, vlv_config
from .test_language_models import OWN_SIZES, SIZES

IMAGE = VOCABULARY
WORDS = torch.tensor([[11, 12, 13], [0, 11, 12], [0, 0, 14]])
PADDED = {"input_ids": WORDS, "attention_mask": (WORDS != 0).long()}
SEARCHES = {
    "greedy": {},
    "beams": {"num_beams": 4, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "sampled beams": {"do_sample": True, "num_beams": 3, "early_stopping": True},
}
LENGTH = {"max_new_tokens": 7, "min_new_tokens": 5}
# Sliding windows of 4 of the 8 positions of an image, and layers with a state besides keys and values
OTHER = {
    "gpt2": OWN_SIZES["gpt2"] | {"initializer_range": 0.3},  # else all captions are equal
    "gemma3_text": SIZES | {"query_pre_attn_scalar": 16, "sliding_window": 4},
    "lfm2": SIZES | {"layer_types": ["conv", "full_attention"]},
}


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(7))


def build(kind: str) -> VLVForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, **{**OWN_SIZES, **OTHER}.get(kind, SIZES)}
    model = VLVForConditionalGeneration(vlv_config(text_config=AutoConfig.for_model(kind, **sizes))).eval()
    model.config.image_token_id = IMAGE
    return model


def with_images(words: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The words with the tokens of an image before them."""
    images = torch.full((3, QUERIES), IMAGE)
    mask = words.get("attention_mask", torch.ones_like(words["input_ids"]))
    return {
        "input_ids": torch.cat([images, words["input_ids"]], dim=1),
        "attention_mask": torch.cat([torch.ones_like(images), mask], dim=1),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2", "llama", "opt", *OTHER])
@torch.no_grad()
def test_the_ids_are_those_of_the_language_model_that_reads_each_row(kind, pixels):
    """Without words, and with words of different lengths as a prefix and behind image tokens."""
    model = build(kind)
    caption_embeds = model.model.get_caption_embeds(pixels)
    written = set()
    for words, forms in (({}, [{}]), (PADDED, [PADDED, with_images(PADDED)])):
        prefix, mask, _ = model.get_prefix(caption_embeds=caption_embeds, **words)
        for name, search in SEARCHES.items():
            torch.manual_seed(5)
            expected = model.language_model.generate(inputs_embeds=prefix, attention_mask=mask, **LENGTH, **search)
            for form in forms:
                torch.manual_seed(5)
                ids = model.generate(caption_embeds=caption_embeds, **form, **LENGTH, **search)
                assert torch.equal(ids[:, -expected.shape[1] :], expected), (name, form)
            written |= set(map(tuple, expected.tolist()))
    assert len(written) > 5


@pytest.mark.parametrize(("rows", "search"), [(4, SEARCHES["beams"]), (3, SEARCHES["samples"])])
def test_the_prefix_is_read_once_an_image(rows, search, pixels):
    model = build("qwen2")
    read = []

    def note_shape(module, arguments, inputs) -> None:
        read.append((inputs["input_ids"] if inputs["inputs_embeds"] is None else inputs["inputs_embeds"]).shape[:2])

    model.get_decoder().register_forward_pre_hook(note_shape, with_kwargs=True)
    model.generate(pixels, **LENGTH, **search)
    assert read[0] == (3, QUERIES - 1) and set(read[1:]) == {(3 * rows, 1)}


@pytest.mark.parametrize("search", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_static_cache_gives_the_same_ids(search, pixels):
    model = build("qwen2")
    expected = model.generate(pixels, **PADDED, **LENGTH, **search)
    assert torch.equal(model.generate(pixels, **PADDED, **LENGTH, **search, cache_implementation="static"), expected)


def test_a_cache_in_place_holds_what_transformers_own_cache_holds():
    """Also where rows change places among images, and after positions or rows are removed."""
    config = Qwen2Config(num_hidden_layers=2)
    random = torch.Generator().manual_seed(0)

    def both(change):
        for cache in caches:
            change(cache)
        for ours, expected in zip(caches[0].layers, caches[1].layers, strict=True):
            assert torch.equal(ours.keys, expected.keys) and torch.equal(ours.values, expected.values)
            assert ours.get_seq_length() == expected.get_seq_length()

    def add(length: int) -> None:
        rows = len(caches[1].layers[0].keys) if caches[1].get_seq_length() else 2
        states = torch.randn(2, 2, rows, 2, length, 4, generator=random)
        both(lambda cache: [cache.update(*states[layer], layer) for layer in range(2)])

    caches = CaptionCache(config), DynamicCache(config=config)
    add(5)
    for cache, repeat in zip(caches, ("share", "batch_repeat_interleave"), strict=True):
        getattr(cache, repeat)(3)
    orders = [[1, 1, 0, 5, 3, 4], [2, 0, 1, 3, 3, 3], [3, 4, 5, 0, 1, 2], [0, 0, 1, 4, 3, 5]]  # the third: of images
    for order in orders:
        add(1)
        both(lambda cache, order=order: cache.reorder_cache(torch.tensor(order)))
    add(70)  # more than there was room for
    both(lambda cache: cache.crop(-74))
    add(2)
    both(lambda cache: cache.reorder_cache(torch.tensor(orders[1])))
    both(lambda cache: cache.batch_select_indices(torch.tensor([5, 0])))
    add(1)
    both(lambda cache: cache.reorder_cache(torch.tensor([1, 0])))
    both(lambda cache: cache.batch_repeat_interleave(2))
    add(1)
