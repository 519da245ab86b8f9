"""VLV's models follow the conventions that every model of transformers follows."""

import importlib
import sys

import pytest
import torch

from vlv import VLVForConditionalGeneration, VLVImageProcessor, VLVModel, VLVProcessor

from ..builders import (
    POSITIONS,
    QUERIES,
    TEXT_WIDTH,
    VOCABULARY,
    assert_close_to_scale,
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
        ({"past_key_values": object()}, "'past_key_values'; expected pixel_values, caption_embeds"),
        ({"position_ids": WORDS}, "'position_ids'"),
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
    with pytest.raises(ValueError, match="there is no image to caption"):
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
