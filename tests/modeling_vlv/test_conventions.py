"""VLV's models follow the conventions that every model of transformers follows."""

import importlib
import inspect
import sys

import pytest
import torch
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

from vlv import VLVConfig, VLVForConditionalGeneration, VLVImageProcessor, VLVModel, VLVProcessor

from ..builders import (
    POSITIONS,
    QUERIES,
    TEXT_WIDTH,
    VOCABULARY,
    assert_close_to_scale,
    language_model_config,
    vlv_config,
)

LABELS = torch.tensor([[5, 6, 7, 3], [8, 3, -100, -100], [9, 10, 3, -100]])
WORDS = torch.tensor([[5, 6], [7, 8], [9, 10]])
HEADS, LM_WIDTH, LAYERS = 2, 40, 2  # of the text encoder and the language model in builders.py


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(7))


# Hidden states and attentions


def test_the_encoder_returns_hidden_states_and_attentions_of_its_text_encoder(encoder, pixels):
    encoder.set_attn_implementation("eager")
    output = encoder(pixels, output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in output.hidden_states] == [(3, QUERIES, TEXT_WIDTH)] * (LAYERS + 1)
    assert [weights.shape for weights in output.attentions] == [(3, HEADS, QUERIES, QUERIES)] * LAYERS
    final = encoder.text_encoder.final_layer_norm(output.hidden_states[-1])
    assert torch.equal(final, output.conditioning)
    assert_close_to_scale(output.attentions[0].sum(-1), torch.ones(3, HEADS, QUERIES))
    plain = encoder(pixels)
    assert plain.hidden_states is None and plain.attentions is None
    assert torch.equal(plain.conditioning, output.conditioning)


def test_words_give_the_hidden_states_that_the_text_encoder_gives(encoder):
    ids = torch.randint(5, VOCABULARY, (2, POSITIONS), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    got = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    expected = encoder.text_encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    assert torch.equal(got.conditioning, expected.last_hidden_state)
    assert len(got.hidden_states) == len(expected.hidden_states) == LAYERS + 1
    assert all(torch.equal(a, b) for a, b in zip(got.hidden_states, expected.hidden_states, strict=True))
    assert not torch.equal(got.conditioning, encoder(input_ids=ids).conditioning)


def test_the_captioner_returns_hidden_states_and_attentions_of_its_language_model(captioner, pixels):
    captioner.set_attn_implementation("eager")
    output = captioner(
        pixels, input_ids=WORDS, labels=LABELS, full_logits=True, output_hidden_states=True, output_attentions=True
    )
    length = QUERIES + WORDS.shape[1] + LABELS.shape[1]
    assert [state.shape for state in output.hidden_states] == [(3, length, LM_WIDTH)] * (LAYERS + 1)
    assert [weights.shape for weights in output.attentions] == [(3, HEADS, length, length)] * LAYERS
    assert torch.equal(captioner.get_output_embeddings()(output.hidden_states[-1]), output.logits)
    above_the_diagonal = torch.ones(length, length).triu(1).bool()
    assert output.attentions[0][:, :, above_the_diagonal].eq(0).all()


@pytest.mark.parametrize("name", ["encoder", "captioner"])
def test_a_configuration_may_ask_for_hidden_states(name, pixels, request):
    model = request.getfixturevalue(name)
    model.config.output_hidden_states = True
    assert len(model(pixels).hidden_states) == LAYERS + 1
    assert model(pixels, output_hidden_states=False).hidden_states is None


def test_image_features_are_the_pooler_output_of_the_vision_tower(captioner, pixels):
    features = captioner.get_image_features(pixels, output_hidden_states=True)
    d_model = captioner.config.image_encoder_config.text_config.d_model
    assert features.pooler_output.shape == (3, 1 + (64 // 8) ** 2, d_model)
    assert features.hidden_states is not None and features.last_hidden_state.shape[0] == 3
    as_tuple = captioner.model.get_image_features(pixels, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[1], features.pooler_output)
    with pytest.raises(TypeError, match="image_sizes"):
        captioner.get_image_features(pixels, image_sizes=[[64, 64]])


@pytest.mark.parametrize("name", ["pooler_output", "last_hidden_state"])
def test_image_features_take_the_place_of_images(name, captioner, pixels):
    ready = captioner.get_image_features(pixels)[name]
    expected = captioner(pixels, labels=LABELS), captioner.generate(pixels, max_new_tokens=3)
    captioner.model.image_encoder.vision_tower = None
    got = captioner(image_features=ready, labels=LABELS), captioner.generate(image_features=ready, max_new_tokens=3)
    assert torch.equal(got[0].loss, expected[0].loss) and torch.equal(got[1], expected[1])
    assert torch.equal(captioner.model(image_features=ready).caption_embeds, expected[0].caption_embeds)


def test_image_features_that_do_not_fit_are_refused(captioner, pixels):
    ready = captioner.get_image_features(pixels).pooler_output
    with pytest.raises(ValueError, match="exactly one of pixel_values, caption_embeds, input_ids and image_features"):
        captioner(pixels, image_features=ready, labels=LABELS)
    with pytest.raises(ValueError, match=r"image_features must be \(batch, image tokens, 24\), got \(3, 65, 23\)"):
        captioner.model(image_features=ready[..., 1:])


def test_keys_and_values_are_returned_on_request(captioner, pixels):
    output = captioner(pixels, use_cache=True)
    assert output.past_key_values.get_seq_length() == QUERIES
    first = output.logits[:, -1:].argmax(-1)
    continued = captioner.language_model(input_ids=first, past_key_values=output.past_key_values).logits
    expected = captioner(pixels, input_ids=first).logits
    assert_close_to_scale(continued, expected)
    assert captioner(pixels, use_cache=False).past_key_values is None


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"imput_ids": WORDS}, r"forward does not use the argument 'imput_ids'; did you mean 'input_ids'\?"),
        ({"label": LABELS}, r"'label'; did you mean 'labels'\?"),
        ({"output_hidden_state": True}, r"did you mean 'output_hidden_states'\?"),
        ({"past_key_values": object()}, "'past_key_values' belongs to input_ids with image tokens"),
        ({"position_ids": WORDS}, "'position_ids' belongs to input_ids with image tokens"),
        ({"logits_to_keep": 1}, "'logits_to_keep' belongs to input_ids with image tokens"),
    ],
)
def test_an_argument_that_has_no_effect_is_refused(captioner, pixels, arguments, message):
    with pytest.raises(TypeError, match=message):
        captioner(pixels, **arguments)


def test_the_encoder_refuses_arguments_that_have_no_effect(encoder, pixels):
    with pytest.raises(TypeError, match=r"VLVModel.forward.*'pixel_value'; did you mean 'pixel_values'"):
        encoder(pixel_value=pixels)
    with pytest.raises(TypeError, match="use_cache"):
        encoder(pixels, use_cache=True)
    with pytest.raises(ValueError, match="attention_mask belongs to input_ids"):
        encoder(pixels, attention_mask=torch.ones(3, 1))


def test_arguments_that_generic_tools_pass_without_a_value_are_accepted(captioner, encoder, pixels):
    passed = {"output_attentions": False, "output_hidden_states": None, "return_dict": None, "use_cache": False}
    expected = captioner(pixels, labels=LABELS).loss
    unset = dict.fromkeys(("inputs_embeds", "past_key_values", "position_ids", "token_type_ids"))
    assert torch.equal(captioner(pixels, labels=LABELS, num_items_in_batch=None, **passed, **unset).loss, expected)
    assert torch.equal(encoder(pixels, **passed, **unset).conditioning, encoder(pixels).conditioning)


def test_a_text_prefix_may_be_given_as_embeddings(captioner, pixels):
    embeds = captioner.get_input_embeddings()(WORDS)
    expected = captioner(pixels, input_ids=WORDS, labels=LABELS).logits
    assert torch.equal(captioner(pixels, inputs_embeds=embeds, labels=LABELS).logits, expected)
    with pytest.raises(ValueError, match="not as both"):
        captioner(pixels, input_ids=WORDS, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="2 rows of inputs_embeds for 3 images"):
        captioner(pixels, inputs_embeds=embeds[:2])


@pytest.mark.parametrize("ignored", [0, 1])
def test_labels_that_repeat_the_input_ids_are_refused(captioner, pixels, ignored):
    """The collators of other models align labels with input_ids, where a VLV would learn to repeat its prefix."""
    labels = WORDS.clone()
    labels[:, :ignored] = -100
    with pytest.raises(ValueError, match="labels are the caption alone"):
        captioner(pixels, input_ids=WORDS, attention_mask=torch.ones_like(WORDS), labels=labels)


def test_a_caption_of_the_prefixs_length_is_no_repetition(captioner, pixels):
    """Also where padding of the prefix and end of the caption are the same token."""
    prefix = torch.tensor([[3, 5]] * 3)
    labels = torch.tensor([[3, -100]] * 3)
    mask = torch.tensor([[0, 1]] * 3)
    assert captioner(pixels, input_ids=prefix, attention_mask=mask, labels=labels).loss > 0
    assert captioner(pixels, input_ids=WORDS, labels=WORDS.flip(1)).loss > 0


def test_words_without_an_image_are_refused(captioner):
    with pytest.raises(ValueError, match="an image to caption is missing"):
        captioner.generate(input_ids=WORDS)


def test_an_attention_mask_without_words_is_refused(captioner, pixels):
    with pytest.raises(ValueError, match="attention_mask belongs to a text prefix"):
        captioner(pixels, attention_mask=torch.ones(3, QUERIES))


def test_generation_takes_its_input_under_the_generic_name(captioner, pixels):
    expected = captioner.generate(pixels, max_new_tokens=3)
    assert torch.equal(captioner.generate(inputs=pixels, max_new_tokens=3), expected)
    with pytest.raises(ValueError, match="another name of pixel_values"):
        captioner.generate(pixels, inputs=pixels)


# Parts


@pytest.mark.parametrize("name", ["encoder", "captioner"])
def test_the_encoder_of_a_model_is_its_image_encoder(name, request):
    model = request.getfixturevalue(name)
    image_encoder = model.base_model.image_encoder
    assert model.get_encoder() is image_encoder
    assert model.get_encoder("image") is image_encoder.vision_tower
    replacement, tower = torch.nn.Identity(), torch.nn.Identity()
    model.set_encoder(tower, "image")
    assert model.get_encoder("image") is tower
    model.set_encoder(replacement)
    assert model.get_encoder() is replacement


@pytest.mark.parametrize("name", ["encoder", "captioner"])
def test_word_embeddings_can_be_replaced(name, request):
    model = request.getfixturevalue(name)
    owner = model.text_encoder if name == "encoder" else model.language_model
    assert model.get_input_embeddings() is owner.get_input_embeddings()
    replacement = torch.nn.Embedding(VOCABULARY, model.get_input_embeddings().embedding_dim)
    model.set_input_embeddings(replacement)
    assert model.get_input_embeddings() is owner.get_input_embeddings() is replacement


@pytest.mark.parametrize("name", ["encoder", "captioner"])
def test_a_model_with_more_words_can_be_saved(name, pixels, tmp_path, request):
    model = request.getfixturevalue(name)
    before = model.get_input_embeddings().weight.clone()
    resized = model.resize_token_embeddings(VOCABULARY + 5)
    assert resized.weight.shape[0] == VOCABULARY + 5 and resized is model.get_input_embeddings()
    assert torch.equal(resized.weight[:VOCABULARY], before)
    sizes = [model.config.text_encoder_config.vocab_size, getattr(model.config.text_config, "vocab_size", None)]
    assert sizes == ([VOCABULARY + 5, None] if name == "encoder" else [VOCABULARY, VOCABULARY + 5])
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.get_input_embeddings().weight, resized.weight)
    assert torch.equal(loaded(pixels)[0], model(pixels)[0])


def test_tied_weights_stay_tied(captioner, tmp_path):
    captioner.save_pretrained(tmp_path)
    loaded = VLVForConditionalGeneration.from_pretrained(tmp_path)
    for model in (captioner, loaded):
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    loaded.set_input_embeddings(torch.nn.Embedding(VOCABULARY, LM_WIDTH))
    loaded.tie_weights()
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_untied_weights_stay_untied(tmp_path):
    config = language_model_config()
    config.tie_word_embeddings = False
    model = VLVForConditionalGeneration(vlv_config(text_config=config))
    model.save_pretrained(tmp_path)
    loaded = VLVForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded.get_output_embeddings().weight, model.get_output_embeddings().weight)
    assert not torch.equal(loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight)


# Outputs


@pytest.mark.parametrize("name", ["encoder", "captioner"])
def test_a_tuple_holds_what_the_output_holds(name, pixels, request):
    model = request.getfixturevalue(name)
    arguments = {"labels": LABELS} if name == "captioner" else {}
    output = model(pixels, output_hidden_states=True, **arguments)
    as_tuple = model(pixels, output_hidden_states=True, return_dict=False, **arguments)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == len(output.keys())
    for value, expected in zip(as_tuple, output.to_tuple(), strict=True):
        pairs = zip(value, expected, strict=True) if isinstance(value, tuple) else [(value, expected)]
        assert all(torch.equal(one, other) for one, other in pairs)
    assert torch.equal(as_tuple[0], output.loss if name == "captioner" else output.caption_embeds)


@pytest.mark.parametrize("name", ["encoder", "captioner"])
def test_the_first_argument_of_forward_is_the_main_input(name, request):
    model = request.getfixturevalue(name)
    first, *others = inspect.signature(model.forward).parameters
    assert first == model.main_input_name == "pixel_values"
    assert others[-1] == "kwargs"  # transformers' Trainer then passes num_items_in_batch


@pytest.mark.parametrize("name", ["encoder", "captioner"])
def test_outputs_are_the_same_each_time_and_after_saving(name, pixels, tmp_path, request):
    model = request.getfixturevalue(name)
    expected = model(pixels)[0]
    assert torch.equal(model(pixels)[0], expected)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(type(model).from_pretrained(tmp_path).eval()(pixels)[0], expected)


def test_logits_do_not_depend_on_the_batch(captioner, pixels):
    together = captioner(pixels, input_ids=WORDS).logits
    for row in range(3):
        assert_close_to_scale(
            captioner(pixels[row : row + 1], input_ids=WORDS[row : row + 1]).logits[0], together[row]
        )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_the_text_prefix_changes_nothing(captioner, pixels, side):
    padding = torch.zeros(3, 2, dtype=torch.long)
    order = (padding, WORDS) if side == "left" else (WORDS, padding)
    mask = torch.cat([(part is WORDS) * torch.ones_like(part) for part in order], dim=1)
    padded = captioner(pixels, input_ids=torch.cat(order, dim=1), attention_mask=mask, labels=LABELS).logits
    assert_close_to_scale(padded, captioner(pixels, input_ids=WORDS, labels=LABELS).logits)


def test_training_keeps_no_cache(captioner, pixels):
    caches = []
    for part in (captioner.language_model, captioner.model.image_encoder.language_model.decoder):
        part.register_forward_hook(lambda module, inputs, output: caches.append(output.past_key_values))
    captioner.train()
    captioner(pixels, labels=LABELS).loss.backward()
    assert caches == [None, None]


# Configuration


def test_a_configuration_is_the_same_after_saving(tmp_path):
    config = vlv_config(text_config=language_model_config(), attend_all_queries=True, query_initializer_range=0.5)
    config.save_pretrained(tmp_path)
    loaded = VLVConfig.from_pretrained(tmp_path)
    fields = ("num_query_tokens", "task_prompt_ids", "attend_all_queries", "query_initializer_range")
    assert [getattr(loaded, name) for name in fields] == [getattr(config, name) for name in fields]
    for part in ("image_encoder_config", "text_encoder_config", "text_config"):
        assert type(getattr(loaded, part)) is type(getattr(config, part))
        assert getattr(loaded, part).to_diff_dict() == getattr(config, part).to_diff_dict()
    assert loaded.get_text_config().vocab_size == VOCABULARY
    assert VLVConfig.from_dict(loaded.to_dict()).to_dict() == loaded.to_dict()


@pytest.mark.slow
@pytest.mark.parametrize("model_class", [VLVModel, VLVForConditionalGeneration])
def test_a_model_loads_in_the_precision_asked_for(model_class, captioner, tmp_path):
    captioner.to(torch.bfloat16).save_pretrained(tmp_path)
    for dtype, expected in ((None, torch.bfloat16), ("auto", torch.bfloat16), (torch.float32, torch.float32)):
        model = model_class.from_pretrained(tmp_path, dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {expected}


@pytest.mark.slow
@pytest.mark.parametrize("model_class", [VLVModel, VLVForConditionalGeneration])
def test_weights_that_stay_on_disk_give_the_same_output(model_class, captioner, pixels, tmp_path):
    captioner.save_pretrained(tmp_path / "saved")
    placed = model_class.from_pretrained(
        tmp_path / "saved", device_map="auto", max_memory={"cpu": "100KB"}, offload_folder=tmp_path / "offloaded"
    )
    assert "disk" in placed.hf_device_map.values()
    expected = captioner.model if model_class is VLVModel else captioner
    assert torch.equal(placed(pixels)[0], expected(pixels)[0])


# Generation


@pytest.mark.parametrize(
    ("arguments", "kind", "rows"),
    [
        ({}, GenerateDecoderOnlyOutput, 3),
        ({"do_sample": True, "top_k": 5, "num_return_sequences": 2}, GenerateDecoderOnlyOutput, 6),
        ({"num_beams": 2}, GenerateBeamDecoderOnlyOutput, 3),
        ({"num_beams": 2, "do_sample": True}, GenerateBeamDecoderOnlyOutput, 3),
    ],
    ids=["greedy", "sample", "beams", "beam sample"],
)
def test_generation_returns_scores_on_request(captioner, pixels, arguments, kind, rows):
    length = {"max_new_tokens": 3, "min_new_tokens": 3}
    output = captioner.generate(
        pixels, return_dict_in_generate=True, output_scores=True, output_hidden_states=True, **length, **arguments
    )
    assert isinstance(output, kind) and output.sequences.shape == (rows, 3)
    beams = arguments.get("num_beams", 1) * 3 if "num_beams" in arguments else rows
    assert [scores.shape for scores in output.scores] == [(beams, VOCABULARY)] * 3
    assert len(output.hidden_states) == 3 and output.hidden_states[0][-1].shape == (beams, QUERIES, LM_WIDTH)
    if not arguments:
        assert torch.equal(torch.stack([scores.argmax(-1) for scores in output.scores], dim=1), output.sequences)


# Processor


def test_a_processor_keeps_the_defaults_of_its_tokenizer(image_processor, processor):
    tokenizer = processor.tokenizer
    before = (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.pad_token, tokenizer.model_max_length)
    own = VLVProcessor(image_processor, tokenizer)
    own(text=["a", "a large dog"], suffix=["a", "a large dog"])
    after = (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.pad_token, tokenizer.model_max_length)
    assert before == after


def test_flat_and_nested_arguments_agree(processor, images):
    flat = {"do_normalize": False, "padding": "max_length", "max_length": 5}
    nested = {"images_kwargs": {"do_normalize": False}, "text_kwargs": {"padding": "max_length", "max_length": 5}}
    one, other = (processor(images=images[:2], text=["a", "a large"], **arguments) for arguments in (flat, nested))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert one.input_ids.shape == (2, 5) and one.pixel_values.min() >= 0


def test_the_processor_names_the_models_inputs(processor, captioner, images):
    batch = processor(images=images[:2], text="a")
    assert list(batch) == processor.model_input_names
    assert set(processor.model_input_names) <= set(inspect.signature(captioner.forward).parameters)
    assert processor.image_processor.model_input_names == ["pixel_values"]


def test_an_image_processor_keeps_its_settings(tmp_path):
    settings = {
        "size": {"height": 20, "width": 30},
        "pre_crop_size": 40,
        "do_center_crop": True,
        "crop_size": {"height": 10, "width": 12},
        "do_pad": True,
        "pad_size": {"height": 16, "width": 16},
    }
    VLVImageProcessor(**settings).save_pretrained(tmp_path)
    loaded = VLVImageProcessor.from_pretrained(tmp_path)
    for name, value in settings.items():
        assert (dict(getattr(loaded, name)) if isinstance(value, dict) else getattr(loaded, name)) == value
    assert loaded(torch.zeros(3, 9, 9), return_tensors="pt").pixel_values.shape == (1, 3, 16, 16)


# Subclasses


@pytest.fixture
def users_module(tmp_path, monkeypatch):
    """A package whose classes extend VLV's, with imports of all relative forms."""
    package = tmp_path / "users_package"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "inner" / "__init__.py").write_text("WIDTH = 3\n")
    (package / "inner" / "deep.py").write_text("DEPTH = 2\n")
    (package / "models.py").write_text(
        "from . import inner\n"
        "from .inner import WIDTH\n"
        "from .inner.deep import DEPTH\n"
        "from vlv import VLVConfig, VLVForConditionalGeneration, VLVImageProcessor, VLVModel, VLVProcessor\n"
        + "".join(
            f"class My{name}({name}):\n    pass\n"
            for name in ("VLVForConditionalGeneration", "VLVModel", "VLVImageProcessor", "VLVProcessor", "VLVConfig")
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("users_package.models")
    for name in [name for name in sys.modules if name.startswith("users_package")]:
        del sys.modules[name]


@pytest.mark.slow
def test_subclasses_in_a_users_package_can_be_saved(users_module, captioner, encoder, processor, tmp_path):
    parts = {
        users_module.MyVLVForConditionalGeneration: users_module.MyVLVForConditionalGeneration(captioner.config),
        users_module.MyVLVModel: users_module.MyVLVModel(encoder.config),
        users_module.MyVLVConfig: users_module.MyVLVConfig(**encoder.config.to_dict()),
        users_module.MyVLVImageProcessor: users_module.MyVLVImageProcessor(size={"height": 32, "width": 32}),
    }
    for part_class, part in parts.items():
        part.save_pretrained(tmp_path / part_class.__name__)
        assert type(part_class.from_pretrained(tmp_path / part_class.__name__)) is part_class
        assert not (tmp_path / part_class.__name__ / "models.py").exists()
    users_module.MyVLVProcessor(processor.image_processor, processor.tokenizer).save_pretrained(tmp_path / "processor")
    assert not (tmp_path / "processor" / "models.py").exists()
    registered = (VLVForConditionalGeneration, VLVModel, VLVImageProcessor, VLVProcessor)
    assert all(part_class._auto_class for part_class in registered)
