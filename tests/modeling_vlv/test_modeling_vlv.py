"""VLV's models compute what the paper says, survive saving, and refuse what they cannot do."""

from collections import Counter

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPTextModel,
    Florence2Model,
    MaxLengthCriteria,
    Qwen2ForCausalLM,
    TextStreamer,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from vlv import VLVConfig, VLVForConditionalGeneration, VLVModel
from vlv.modeling_vlv import encode_text_embeds

from ..builders import (
    POSITIONS,
    QUERIES,
    TEXT_WIDTH,
    VOCABULARY,
    assert_close_to_scale,
    language_model_config,
    vlv_config,
)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(7))


LABELS = torch.tensor([[5, 6, 7, 3], [8, 3, -100, -100], [9, 10, 3, -100]])


# The encoder


def test_caption_embeddings_and_conditioning_have_one_row_a_query_token(encoder, pixels):
    output = encoder(pixels)
    assert output.caption_embeds.shape == output.conditioning.shape == (3, QUERIES, TEXT_WIDTH)


def test_text_embeddings_encode_as_their_token_ids_do(encoder):
    """`T(z)` with z the embeddings of real words is what `CLIPTextModel` makes of the words."""
    ids = torch.randint(5, VOCABULARY, (2, POSITIONS), generator=torch.Generator().manual_seed(1))
    embeds = encoder.text_encoder.embeddings.token_embedding(ids)
    expected = encoder.text_encoder(input_ids=ids).last_hidden_state
    assert_close_to_scale(encode_text_embeds(encoder.text_encoder, embeds), expected)
    assert_close_to_scale(encoder(caption_embeds=embeds).conditioning, expected)


def test_query_tokens_attend_causally_unless_attend_all_queries_is_set(pixels):
    torch.manual_seed(0)
    causal = VLVModel(vlv_config()).eval()
    both_ways = VLVModel(vlv_config(attend_all_queries=True)).eval()
    both_ways.load_state_dict(causal.state_dict())

    def change_last_query(model: VLVModel) -> torch.Tensor:
        before = model.get_caption_embeds(pixels)
        with torch.no_grad():
            model.query_tokens[:, -1].neg_()
        return (model.get_caption_embeds(pixels) - before)[:, 0].abs().max()

    assert change_last_query(causal) == 0
    assert change_last_query(both_ways) > 1e-3


def test_the_task_prompt_changes_the_caption_embeddings(encoder, pixels):
    with_prompt = encoder.get_caption_embeds(pixels)
    encoder.config.task_prompt_ids = []
    assert (encoder.get_caption_embeds(pixels) - with_prompt).abs().max() > 1e-5


def test_gradients_reach_the_queries_through_the_frozen_text_encoder(encoder, pixels):
    encoder.text_encoder.requires_grad_(False)
    encoder(pixels).conditioning.square().sum().backward()
    assert encoder.query_tokens.grad.abs().sum() > 0
    assert all(p.grad is None for p in encoder.text_encoder.parameters())


def test_starts_from_pretrained_parts(tmp_path, stable_diffusion):
    torch.manual_seed(5)
    florence = Florence2Model(vlv_config().image_encoder_config)
    florence.save_pretrained(tmp_path)
    model = VLVModel.from_vision_text_pretrained(str(tmp_path), str(stable_diffusion), num_query_tokens=5)
    assert model.config.num_query_tokens == 5 and model.config.task_prompt_ids == []
    for name, tensor in florence.state_dict().items():
        assert model.image_encoder.state_dict()[name].equal(tensor)
    text_encoder = CLIPTextModel.from_pretrained(stable_diffusion, subfolder="text_encoder")
    for name, tensor in text_encoder.state_dict().items():
        assert model.text_encoder.state_dict()[name].equal(tensor)
    assert 0.7 < model.query_tokens.std() < 1.3  # standard normal, as the authors'


# Saving


def stored_fields(config: dict) -> dict:
    """A configuration without what loading adds to it."""
    added = ("dtype", "_name_or_path", "architectures", "transformers_version")
    return {k: stored_fields(v) if isinstance(v, dict) else v for k, v in config.items() if k not in added}


@pytest.mark.parametrize("model_class", [VLVModel, VLVForConditionalGeneration])
def test_every_tensor_survives_saving(model_class, tmp_path):
    torch.manual_seed(0)
    text_config = language_model_config() if model_class is VLVForConditionalGeneration else None
    model = model_class(vlv_config(text_config=text_config))
    model.save_pretrained(tmp_path)
    loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert stored_fields(loaded.config.to_dict()) == stored_fields(model.config.to_dict())


def test_buffers_have_the_same_values_after_loading(tmp_path, encoder, pixels):
    encoder.save_pretrained(tmp_path)
    assert torch.equal(VLVModel.from_pretrained(tmp_path)(pixels).conditioning, encoder(pixels).conditioning)


def test_auto_classes_load_vlv(tmp_path, captioner):
    captioner.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), VLVConfig)
    assert isinstance(AutoModelForImageTextToText.from_pretrained(tmp_path), VLVForConditionalGeneration)
    encoder = AutoModel.from_pretrained(tmp_path)
    assert isinstance(encoder, VLVModel)
    assert torch.equal(encoder.query_tokens, captioner.model.query_tokens)


def test_stage_2_starts_from_an_encoder_and_a_language_model(stage1_checkpoint, language_model):
    model = VLVForConditionalGeneration.from_vlv_text_pretrained(str(stage1_checkpoint), str(language_model))
    encoder, lm = VLVModel.from_pretrained(stage1_checkpoint), AutoModelForCausalLM.from_pretrained(language_model)
    assert all(model.model.state_dict()[n].equal(t) for n, t in encoder.state_dict().items())
    assert all(model.language_model.state_dict()[n].equal(t) for n, t in lm.state_dict().items())
    assert isinstance(model.language_model, Qwen2ForCausalLM)
    assert model.generation_config.eos_token_id == 3


def test_more_query_tokens_than_positions_are_an_error():
    with pytest.raises(ValueError, match=f"choose 1 to {POSITIONS}"):
        vlv_config(num_query_tokens=POSITIONS + 1)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("encoder_config", "image_encoder_config"),
        ("decoder_config", "text_config"),
        ("num_queries", "num_query_tokens"),
    ],
)
def test_a_field_name_of_an_older_version_is_an_error_that_gives_the_new_name(old, new):
    with pytest.raises(ValueError, match=rf"{old}.*{new}"):
        vlv_config(**{old: None})


# Precision and attention


def test_sdpa_is_the_default_and_eager_agrees(tmp_path, captioner, pixels):
    captioner.save_pretrained(tmp_path)
    eager = VLVForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager").eval()
    parts = [captioner, captioner.model.image_encoder.vision_tower, captioner.model.image_encoder.language_model]
    assert {part.config._attn_implementation for part in parts} == {"sdpa"}
    assert eager.model.text_encoder.config._attn_implementation == "eager"
    expected, got = captioner(pixels, labels=LABELS), eager(pixels, labels=LABELS)
    assert_close_to_scale(got.caption_embeds, expected.caption_embeds)
    assert_close_to_scale(got.logits, expected.logits)


def test_every_attention_module_calls_the_attention_function_that_is_set(captioner, pixels, monkeypatch):
    calls: Counter[torch.nn.Module] = Counter()

    def counting_attention(module, *args, **kwargs):
        calls[module] += 1
        return sdpa_attention_forward(module, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "counting", counting_attention)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "counting", sdpa_mask)
    expected = captioner(pixels, labels=LABELS)
    captioner.set_attn_implementation("counting")
    got = captioner(pixels, labels=LABELS)
    assert torch.equal(got.caption_embeds, expected.caption_embeds) and torch.equal(got.logits, expected.logits)
    attention = {module for module in captioner.modules() if type(module).__name__.endswith("Attention")}
    assert len(attention) == 17  # 4 window, 4 channel, 1 + 2 + 2 (cross) of Florence-2, 2 of CLIP, 2 of Qwen2
    assert calls == Counter(dict.fromkeys(attention, 1))
    assert VLVModel._supports_attention_backend and VLVForConditionalGeneration._supports_attention_backend


@pytest.mark.slow
def test_forward_compiles_as_one_graph(captioner, pixels):
    """The graph contains that of the encoder."""
    caption = torch.compile(captioner, fullgraph=True, backend="eager")
    with torch.no_grad():
        got, expected = caption(pixels, labels=LABELS), captioner(pixels, labels=LABELS)
    assert torch.equal(got.caption_embeds, expected.caption_embeds)
    assert torch.equal(got.loss, expected.loss) and torch.equal(got.logits, expected.logits)
    assert VLVModel._can_compile_fullgraph and VLVForConditionalGeneration._can_compile_fullgraph


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_nearly_the_same_loss(tmp_path, captioner, pixels, dtype):
    captioner.save_pretrained(tmp_path)
    half = VLVForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype).eval()
    output = half(pixels, labels=LABELS)
    assert output.caption_embeds.dtype == dtype
    assert output.loss.dtype == torch.float32
    assert abs(output.loss - captioner(pixels, labels=LABELS).loss) < 0.1
    assert half.generate(pixels, max_new_tokens=3).shape == (3, 3)


@pytest.mark.slow
def test_device_map_auto_gives_the_same_loss(tmp_path, captioner, pixels):
    captioner.save_pretrained(tmp_path)
    placed = VLVForConditionalGeneration.from_pretrained(tmp_path, device_map="auto").eval()
    assert torch.equal(placed(pixels, labels=LABELS).loss, captioner(pixels, labels=LABELS).loss)


def test_gradient_checkpointing_computes_each_layer_twice_and_gives_the_same_gradients(captioner, pixels):
    layers = {n: m for n, m in captioner.named_modules() if isinstance(m, GradientCheckpointingLayer)}
    calls: Counter[str] = Counter()
    for name, layer in layers.items():
        # The attention is inside what is computed again; the layer's own hooks and its last submodule are not.
        layer.self_attn.register_forward_hook(lambda module, inputs, output, name=name: calls.update([name]))

    def gradient() -> torch.Tensor:
        calls.clear()
        captioner.zero_grad()
        captioner(pixels, labels=LABELS).loss.backward()
        return captioner.model.query_tokens.grad.clone()

    for module in captioner.modules():  # dropout would differ between the two passes
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "activation_dropout", "attention_dropout", "drop_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    captioner.train()
    plain = gradient()
    assert calls == dict.fromkeys(layers, 1)
    captioner.gradient_checkpointing_enable()
    assert captioner.is_gradient_checkpointing
    assert_close_to_scale(gradient(), plain)
    assert calls == dict.fromkeys(layers, 2)
    parts = ("model.image_encoder.", "model.text_encoder.", "language_model.")
    assert all(any(name.startswith(part) for name in layers) for part in parts)


# The loss


def test_the_loss_is_that_of_the_language_model_over_prefix_and_caption(captioner, pixels):
    prefix, _, _ = captioner.get_prefix(pixels)
    expected, count = 0.0, 0
    for row, label in zip(prefix, LABELS, strict=True):
        ids = label[label != -100][None]
        embeds = torch.cat([row[None], captioner.get_input_embeddings()(ids)], dim=1)
        ignored = torch.full((1, prefix.shape[1]), -100)
        loss = captioner.language_model(inputs_embeds=embeds, labels=torch.cat([ignored, ids], dim=1)).loss
        expected, count = expected + loss * ids.shape[1], count + ids.shape[1]
    got = captioner(pixels, labels=LABELS)
    assert_close_to_scale(got.loss, expected / count)
    assert got.logits.shape == (3, 4, VOCABULARY)


def test_training_computes_logits_only_where_there_is_a_label(captioner, pixels):
    sizes = []
    captioner.get_output_embeddings().register_forward_hook(lambda module, inputs, output: sizes.append(output.shape))
    evaluated = captioner(pixels, labels=LABELS).loss
    captioner.train()
    for module in captioner.modules():
        module.training = False
    captioner.training = True
    output = captioner(pixels, labels=LABELS)
    assert output.logits is None
    assert sizes[-1] == ((LABELS != -100).sum(), VOCABULARY)
    assert_close_to_scale(output.loss, evaluated)


def test_full_logits_begin_with_the_prefix(captioner, pixels):
    full = captioner(pixels, labels=LABELS, full_logits=True)
    assert full.logits.shape == (3, QUERIES + 4, VOCABULARY)
    part = captioner(pixels, labels=LABELS)
    assert_close_to_scale(full.logits[:, QUERIES - 1 : QUERIES + 3], part.logits)
    assert_close_to_scale(full.loss, part.loss)


def test_without_labels_the_logits_are_of_the_next_token(captioner, pixels):
    logits = captioner(pixels).logits
    assert logits.shape == (3, 1, VOCABULARY)
    assert torch.equal(logits.argmax(-1), captioner.generate(pixels, max_new_tokens=1))


def test_gradient_accumulation_weighs_tokens_not_batches(captioner, pixels):
    one_batch = captioner(pixels, labels=LABELS).loss
    count = (LABELS != -100).sum()
    parts = [captioner(pixels[i : i + 1], labels=LABELS[i : i + 1], num_items_in_batch=count).loss for i in range(3)]
    assert_close_to_scale(sum(parts), one_batch)


def test_a_text_prefix_of_another_length_changes_nothing_for_its_neighbours(captioner, pixels):
    ids = torch.tensor([[0, 0, 5], [6, 7, 8], [0, 9, 5]])
    mask = torch.tensor([[0, 0, 1], [1, 1, 1], [0, 1, 1]])
    together = captioner(pixels, input_ids=ids, attention_mask=mask, labels=LABELS, return_logits=True).logits
    alone = captioner(pixels[:1], input_ids=ids[:1, 2:], labels=LABELS[:1], return_logits=True).logits
    assert_close_to_scale(together[0], alone[0])


# Generation


def test_captions_do_not_depend_on_their_batch(captioner, pixels):
    together = captioner.generate(pixels, max_new_tokens=6, do_sample=False)
    assert len(set(map(tuple, together.tolist()))) == 3  # else no comparison below could fail
    shuffled = captioner.generate(pixels[[2, 0, 1]], max_new_tokens=6, do_sample=False)
    assert torch.equal(shuffled, together[[2, 0, 1]])
    for i in range(3):
        alone = captioner.generate(pixels[i : i + 1], max_new_tokens=6, do_sample=False)
        assert torch.equal(alone[0], together[i])


def test_caption_embeddings_replace_the_image(captioner, pixels):
    z = captioner.model.get_caption_embeds(pixels)
    assert torch.equal(
        captioner.generate(caption_embeds=z, max_new_tokens=5), captioner.generate(pixels, max_new_tokens=5)
    )
    assert torch.equal(captioner(caption_embeds=z, labels=LABELS).loss, captioner(pixels, labels=LABELS).loss)


def test_beams_sampling_static_cache_and_stopping_criteria_work(captioner, pixels):
    ids = captioner.generate(pixels, max_new_tokens=5, min_new_tokens=5, num_beams=3, num_return_sequences=2)
    assert ids.shape == (6, 5)
    torch.manual_seed(1)
    sampled = captioner.generate(pixels, max_new_tokens=5, do_sample=True, temperature=5.0)
    torch.manual_seed(1)
    assert torch.equal(captioner.generate(pixels, max_new_tokens=5, do_sample=True, temperature=5.0), sampled)
    greedy = captioner.generate(pixels, max_new_tokens=5)
    assert torch.equal(captioner.generate(pixels, max_new_tokens=5, cache_implementation="static"), greedy)
    criteria = [MaxLengthCriteria(max_length=2)]
    assert captioner.generate(pixels, max_new_tokens=5, stopping_criteria=criteria).shape[1] == 2


def test_a_text_prefix_is_continued(captioner, pixels):
    ids = torch.tensor([[5, 6]] * 3)
    joined = captioner(pixels, input_ids=ids).logits[:, 0].argmax(-1)
    assert torch.equal(captioner.generate(pixels, input_ids=ids, max_new_tokens=1)[:, 0], joined)
    empty = captioner.generate(pixels, input_ids=ids[:, :0], max_new_tokens=3)
    assert torch.equal(empty, captioner.generate(pixels, max_new_tokens=3))


def test_a_streamer_receives_the_caption_of_one_image(captioner, pixels, processor, capsys):
    ids = captioner.generate(pixels[:1], max_new_tokens=4, streamer=TextStreamer(processor.tokenizer))
    assert processor.decode(ids[0]).split()[0] in capsys.readouterr().out


def test_its_own_generation_config_is_honoured(captioner, pixels, tmp_path):
    captioner.generation_config.max_new_tokens = 2
    assert captioner.generate(pixels).shape[1] == 2
    assert captioner.generate(pixels, max_new_tokens=4).shape[1] == 4
    captioner.save_pretrained(tmp_path)
    assert VLVForConditionalGeneration.from_pretrained(tmp_path).eval().generate(pixels).shape[1] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_length": 9}, "use max_new_tokens"),
        ({"min_length": 9}, "use min_new_tokens"),
        ({"guidance_scale": 2.0}, "VLVReconstructionPipeline"),
        ({"assistant_model": "any"}, "assistant"),
        ({"prompt_lookup_num_tokens": 3}, "leave it out"),
        ({"inputs_embeds": torch.zeros(1, 1, 1)}, "caption_embeds"),
        ({"caption_embeds": torch.zeros(3, QUERIES, TEXT_WIDTH)}, "exactly one"),
        ({"input_ids": torch.ones(2, 1, dtype=torch.long)}, "2 rows of input_ids for 3 images"),
        ({"input_ids": torch.ones(3, 120, dtype=torch.long)}, "128 tokens, and the language model has 128 positions"),
    ],
)
def test_arguments_that_generation_does_not_support_are_errors_with_advice(captioner, pixels, arguments, message):
    with pytest.raises(ValueError, match=message):
        captioner.generate(pixels, **arguments)


def test_inputs_that_do_not_fit_are_errors_that_name_the_cause(captioner, encoder, stage1_checkpoint):
    with pytest.raises(ValueError, match="exactly one of pixel_values"):
        captioner.generate()
    with pytest.raises(ValueError, match=r"must be \(batch, 3, height, width\)"):
        encoder(torch.zeros(3, 64, 64))
    with pytest.raises(ValueError, match="another model"):
        encoder(caption_embeds=torch.zeros(1, QUERIES, TEXT_WIDTH + 1))
    with pytest.raises(ValueError, match="labels must be"):
        captioner(torch.zeros(2, 3, 64, 64), labels=LABELS)
    with pytest.raises(ValueError, match="this is a stage-1 checkpoint"):
        VLVForConditionalGeneration.from_pretrained(stage1_checkpoint)
