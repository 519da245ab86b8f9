"""Packing, grouping by length and the cache of conditioning: the losses of a run without them, by less work."""

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MistralConfig, OPTConfig, Qwen2MoeConfig

from vlv import VLVForConditionalGeneration
from vlv.train import Stage2Collator
from vlv.train.packing import PACKED_SDPA, pack_captions

from ..builders import QUERIES, VOCABULARY, WEIGHT_SCALE, language_model_config, vlv_config

SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"initializer_range": WEIGHT_SCALE}
GATED = SMALL | {"intermediate_size": 48, "num_key_value_heads": 1}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LANGUAGE_MODELS = {
    "qwen2": language_model_config(),
    "llama": LlamaConfig(**GATED),
    "mistral, with a window of 4": MistralConfig(**GATED, sliding_window=4),
    "qwen2-moe, with a window of 4 in one layer": Qwen2MoeConfig(
        **GATED,
        **{"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4},
        **{"num_experts_per_tok": 2, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    ),
    "gpt2": GPT2Config(
        **{"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 2, "eos_token_id": 3},
        **NO_DROPOUT,
        initializer_range=WEIGHT_SCALE,
    ),
    "opt": OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=16, init_std=WEIGHT_SCALE, dropout=0.0),
}


def build_captioner(text_config) -> VLVForConditionalGeneration:
    torch.manual_seed(0)
    return VLVForConditionalGeneration(vlv_config(text_config=text_config)).eval()


@pytest.fixture
def batch(images, processor) -> dict:
    """Pairs of very different lengths, with an instruction of two words, of one or of none before the caption."""
    captions = ["a", "a large apple at the top left", "a small dog"]
    prompts = ["", "a small", "dog"]
    pairs = zip(images, captions, prompts, strict=False)
    batch = Stage2Collator(processor, 300)([{"image": i, "caption": c, "prompt": p} for i, c, p in pairs])
    return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}


def loss_and_gradients(model, inputs) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs, return_logits=False).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@pytest.mark.parametrize("with_prompts", [False, True])
def test_packed_captions_have_the_loss_and_the_gradients_of_padded_ones(name, with_prompts, batch):
    model = build_captioner(LANGUAGE_MODELS[name])
    inputs = batch if with_prompts else {key: batch[key] for key in ("pixel_values", "labels")}
    loss, gradients = loss_and_gradients(model, inputs)
    pack_captions(model.language_model)
    read = []
    model.get_decoder().register_forward_pre_hook(lambda module, a, kwargs: read.append(kwargs), with_kwargs=True)
    packed_loss, packed_gradients = loss_and_gradients(model, inputs)

    words = int((batch["labels"] != -100).sum()) + (int(batch["attention_mask"].sum()) if with_prompts else 0)
    rows = len(batch["labels"])
    assert [kwargs["inputs_embeds"].shape[:2] for kwargs in read] == [(1, rows * (QUERIES - 1) + words)]
    assert model.language_model.config._attn_implementation == PACKED_SDPA
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    largest = max(gradient.abs().max() for gradient in gradients.values())
    assert packed_gradients.keys() == gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(packed_gradients[key], gradient, rtol=1e-5, atol=1e-5 * float(largest))


def test_a_caption_does_not_depend_on_those_beside_it(batch):
    model = build_captioner(language_model_config())
    pack_captions(model.language_model)
    inputs = {key: batch[key] for key in ("pixel_values", "labels")}
    alone = [
        model(**{key: value[i : i + 1] for key, value in inputs.items()}, return_logits=False).loss for i in range(3)
    ]
    counts = (batch["labels"] != -100).sum(dim=1)
    together = model(**inputs, return_logits=False).loss
    assert together.item() == pytest.approx((torch.stack(alone) * counts).sum().item() / int(counts.sum()), rel=1e-5)


def test_several_captions_of_an_image_share_its_prefix(images, processor):
    captions = ["a", "a large apple at the top left", "a small dog"]
    items = [
        {"image": image, "caption": c} for image, c in zip([images[0], images[1], images[0]], captions, strict=True)
    ]
    shared = Stage2Collator(processor, 300)(items)
    assert len(shared["pixel_values"]) == 2 and shared["image_indices"].tolist() == [0, 1, 0]
    flipped = Stage2Collator(processor, 300)([items[0], items[2] | {"augmentation": {"flip": True}}])
    assert len(flipped["pixel_values"]) == 2 and "image_indices" not in flipped

    model = build_captioner(language_model_config())
    pixels = shared["pixel_values"][shared["image_indices"]]
    expected, gradients = loss_and_gradients(model, {"pixel_values": pixels, "labels": shared["labels"]})
    names = ("pixel_values", "labels", "image_indices")
    loss, shared_gradients = loss_and_gradients(model, {name: shared[name] for name in names})
    assert loss == pytest.approx(expected, rel=1e-5)
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for key, gradient in gradients.items():
        torch.testing.assert_close(shared_gradients[key], gradient, rtol=1e-4, atol=1e-5 * float(largest))
