"""Stage 2 takes any causal language model as it is: its logits, its precision, its settings."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from vlv import VLVForConditionalGeneration, VLVModel, hub

from ..builders import QUERIES, VOCABULARY, assert_close_to_scale, language_model_config, vlv_config

LABELS = torch.tensor([[5, 6, 7, 3], [8, 3, -100, -100], [9, 10, 3, -100]])
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
OWN_SIZES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "vocab_size": VOCABULARY},
    "opt": SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 24, "init_std": 0.3},
    "gpt_neox": SIZES | {"rotary_pct": 0.5},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY},
    "granite": SIZES | {"logits_scaling": 8.0},
    "gemma2": SIZES | {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    "gemma3_text": SIZES | {"query_pre_attn_scalar": 16, "sliding_window": 4},
}
KINDS = (
    "bloom",
    "cohere",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "granite",
    "llama",
    "mistral",
    "opt",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)
SCALED = ("gemma", "gemma2", "gemma3_text")  # their embedding modules multiply by the root of the width


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(7))


def build(kind: str) -> VLVForConditionalGeneration:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{"pad_token_id": 0, **OWN_SIZES.get(kind, SIZES)})
    return VLVForConditionalGeneration(vlv_config(text_config=config)).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_loss_are_the_language_models_own(kind, pixels):
    """Also for capped (Gemma 2) and scaled (Granite, Cohere) logits, and in training, where most are not computed."""
    model = build(kind)
    with torch.no_grad():
        prefix, _, _ = model.get_prefix(pixels)
        words = model.get_input_embeddings()(LABELS.clamp(min=0))
        own = model.language_model(inputs_embeds=torch.cat([prefix, words], dim=1)).logits
        expected = own[:, QUERIES - 1 : -1]
        counted = LABELS != -100
        loss = F.cross_entropy(expected[counted].float(), LABELS[counted])
        output = model(pixels, labels=LABELS)
        assert_close_to_scale(output.logits, expected)
        assert_close_to_scale(model(pixels, labels=LABELS, full_logits=True).logits, own)
        assert_close_to_scale(model(pixels).logits, own[:, QUERIES - 1 : QUERIES])
        assert_close_to_scale(output.loss, loss)
        model.language_model.training = model.training = True  # as in training, without its dropout
        trained = model(pixels, labels=LABELS)
    assert trained.logits is None
    assert_close_to_scale(trained.loss, loss)
    assert own.std() > 1e-3  # else every loss is the same


@pytest.mark.parametrize("kind", KINDS)
def test_a_family_writes_what_step_by_step_argmax_gives_learns_and_is_saved(kind, pixels, tmp_path):
    model = build(kind)
    embed, eos = model.get_input_embeddings(), model.config.text_config.eos_token_id
    with torch.no_grad():
        sequence, _, _ = model.get_prefix(pixels)
        expected = []
        for _ in range(5):
            logits = model.language_model(inputs_embeds=sequence, use_cache=False).logits[:, -1]
            logits[:, eos if eos is not None and eos < VOCABULARY else []] = -torch.inf  # of min_new_tokens
            expected.append(logits.argmax(-1))
            sequence = torch.cat([sequence, embed(expected[-1])[:, None]], dim=1)
        assert torch.equal(model.generate(pixels, max_new_tokens=5, min_new_tokens=5), torch.stack(expected, dim=1))
        word, padded = torch.tensor([[11]]), torch.tensor([[0, 11]])
        alone = model(pixels[:1], input_ids=word, labels=LABELS[:1]).logits
        behind_padding = model(pixels[:1], input_ids=padded, attention_mask=padded.clamp(max=1), labels=LABELS[:1])
        assert_close_to_scale(behind_padding.logits, alone)
        logits = model(pixels, labels=LABELS).logits
    model(pixels, labels=LABELS).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.language_projection.parameters())
    model.save_pretrained(tmp_path)
    loaded = VLVForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(pixels, labels=LABELS).logits, logits)


@pytest.mark.parametrize("kind", ["llama", *SCALED])
def test_caption_embeddings_enter_a_language_model_at_the_scale_of_its_scaled_words(kind, pixels):
    """The embedding module scales words, and nothing scales what is beside them: the projection learns the scale."""
    model = build(kind)
    with torch.no_grad():
        prefix, _, _ = model.get_prefix(pixels)
        states = model(pixels, labels=LABELS, output_hidden_states=True).hidden_states[0]
        words = F.embedding(LABELS.clamp(min=0), model.get_input_embeddings().weight)
    assert_close_to_scale(states[:, :QUERIES], prefix)
    assert_close_to_scale(states[:, QUERIES:], words * (32**0.5 if kind in SCALED else 1))


@pytest.mark.parametrize("settings", [{}, {"labels": LABELS}, {"labels": LABELS, "return_logits": False}])
def test_a_language_model_that_ignores_logits_to_keep_is_an_error(pixels, settings):
    config = AutoConfig.for_model("xlstm", **{**SIZES, "num_hidden_layers": 1, "num_heads": 2, "qk_dim_factor": 1.0})
    model = VLVForConditionalGeneration(vlv_config(text_config=config)).eval()
    with torch.no_grad(), pytest.raises(TypeError, match="xLSTMForCausalLM ignores logits_to_keep"):
        model(pixels, **settings)


@pytest.mark.parametrize("padded_on", ["left", "right"])
def test_padding_of_a_text_prefix_changes_nothing_on_either_side(captioner, pixels, padded_on):
    """The same holds for an empty prefix among others."""
    rows = [[11, 12, 13], [11, 12], []]
    ids, mask = torch.zeros(3, 3, dtype=torch.long), torch.zeros(3, 3, dtype=torch.long)
    for row, words in enumerate(rows):
        where = slice(0, len(words)) if padded_on == "right" else slice(3 - len(words), 3)
        ids[row, where], mask[row, where] = torch.tensor(words, dtype=torch.long), 1
    together = captioner.generate(pixels, input_ids=ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6)
    loss = captioner(pixels, input_ids=ids, attention_mask=mask, labels=LABELS).logits
    for row, words in enumerate(rows):
        alone = {"input_ids": torch.tensor([words], dtype=torch.long)} if words else {}
        one = pixels[row : row + 1]
        assert (
            together[row].tolist() == captioner.generate(one, **alone, max_new_tokens=6, min_new_tokens=6)[0].tolist()
        )
        expected = captioner(one, **alone, labels=LABELS[row : row + 1]).logits[0]
        known = LABELS[row] != -100
        assert_close_to_scale(loss[row][known], expected[known])


def test_an_attention_mask_of_another_shape_is_an_error(captioner, pixels):
    with pytest.raises(ValueError, match=r"attention_mask is \(3, 2\), but input_ids are \(3, 3\)"):
        captioner(pixels, input_ids=torch.ones(3, 3).long(), attention_mask=torch.ones(3, 2).long())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_new_captioner_computes_as_it_does_after_saving(encoder, pixels, tmp_path, dtype):
    """Rotary frequencies, which are not stored, are not rounded with the weights."""
    torch.manual_seed(5)
    language_model = AutoModelForCausalLM.from_config(language_model_config()).to(torch.bfloat16)
    new = VLVForConditionalGeneration.from_vlv_text_pretrained(encoder, language_model, dtype=dtype)
    assert {p.dtype for p in new.parameters()} == {dtype}
    assert {b.dtype for n, b in new.named_buffers() if n.endswith("inv_freq")} == {torch.float32}
    new.save_pretrained(tmp_path)
    loaded = VLVForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype).eval()
    with torch.no_grad():
        expected = loaded(pixels.to(dtype), labels=LABELS).logits
        assert torch.equal(new(pixels.to(dtype), labels=LABELS).logits, expected)


def test_submodels_keep_their_attention_implementations_and_their_configurations(encoder):
    language_model = AutoModelForCausalLM.from_config(language_model_config())
    language_model.set_attn_implementation("eager")
    new = VLVForConditionalGeneration.from_vlv_text_pretrained(encoder, language_model)
    assert new.language_model.config._attn_implementation == "eager"
    assert new.model.text_encoder.config._attn_implementation == "sdpa"
    new.resize_token_embeddings(VOCABULARY + 5)
    assert language_model.config.vocab_size == VOCABULARY == len(language_model.lm_head.weight)


@pytest.mark.slow
def test_weights_that_the_model_does_not_have_are_an_error(tmp_path, processor):
    config = vlv_config(text_config=AutoConfig.for_model("llama", **SIZES, attention_bias=True))
    VLVForConditionalGeneration(config).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    hub.load_captioner(tmp_path)
    unexpected = VLVModel.from_pretrained(tmp_path, output_loading_info=True)[1]["unexpected_keys"]
    assert unexpected and {name.partition(".")[0] for name in unexpected} == {"language_model", "language_projection"}
    hub.load_encoder(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"attention_bias": true', '"attention_bias": false'))
    with pytest.raises(ValueError, match=r"no place in the model that its config\.json describes, such as .*bias"):
        hub.load_captioner(tmp_path)


def test_length_limits_of_the_language_models_own_generation_config_do_not_count_the_prefix(captioner, pixels):
    expected = captioner.generate(pixels, max_new_tokens=7, min_new_tokens=7)
    captioner.generation_config.max_length = 5
    assert torch.equal(captioner.generate(pixels, max_new_tokens=7, min_new_tokens=7), expected)


def test_images_of_more_tokens_than_positions_are_an_error(encoder):
    with pytest.raises(ValueError, match=r"gives 148 tokens, but the encoder has 96 positions; make images smaller"):
        encoder(torch.zeros(1, 3, 96, 96))
