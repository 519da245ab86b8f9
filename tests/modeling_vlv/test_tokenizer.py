"""A tokenizer gets the special tokens that it lacks, and is refused beside another model."""

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from vlv import VLVForConditionalGeneration, VLVProcessor, hub
from vlv.miniature.tokenizer import BEGIN, END, PAD, UNKNOWN, build_tokenizer, vocabulary
from vlv.tokenizer import check_tokenizer, fit_tokenizer

from ..builders import VOCABULARY, language_model_config, vlv_config

WORDS = vocabulary()


def tokenizer_with(**special: str) -> PreTrainedTokenizerFast:
    """The miniature's words, with no special tokens but these and one for unknown words."""
    backend = build_tokenizer(for_text_encoder=False).backend_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=UNKNOWN, **special)


def config_with(**fields):
    config = language_model_config()
    for name, value in ({"eos_token_id": 3, "pad_token_id": None, "bos_token_id": None} | fields).items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize(
    ("special", "fields", "eos", "pad"),
    [
        ({"eos_token": END, "pad_token": PAD}, {"eos_token_id": 7, "pad_token_id": 8}, END, PAD),  # its own come first
        ({"eos_token": END, "bos_token": PAD}, {"pad_token_id": WORDS.index(PAD)}, END, PAD),
        ({"eos_token": END}, {"pad_token_id": WORDS.index("dog")}, END, END),  # an ordinary word
        ({"eos_token": END}, {}, END, END),
        ({"eos_token": END}, {"pad_token_id": 10_000}, END, END),
        ({}, {}, WORDS[3], WORDS[3]),
        ({}, {"eos_token_id": [10_000, 9]}, WORDS[9], WORDS[9]),
    ],
)
def test_special_tokens_that_are_missing_come_from_the_vocabulary(special, fields, eos, pad):
    tokenizer = tokenizer_with(**special)
    size = len(tokenizer)
    fit_tokenizer(tokenizer, config_with(**fields))
    assert (tokenizer.eos_token, tokenizer.pad_token) == (eos, pad)
    assert tokenizer.bos_token == special.get("bos_token")
    assert len(tokenizer) == size


def test_an_ordinary_word_with_the_padding_id_of_the_configuration_stays_in_captions():
    tokenizer = fit_tokenizer(tokenizer_with(eos_token=END), config_with(pad_token_id=WORDS.index("dog")))
    ids = [*tokenizer("a small dog", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a small dog"


def test_a_tokenizer_without_an_eos_token_anywhere_is_an_error():
    with pytest.raises(ValueError, match=r"has no EOS token, .* names none \(eos_token_id\), .*; set eos_token"):
        fit_tokenizer(tokenizer_with(), config_with(eos_token_id=None))


def test_eos_is_learnt_where_padding_has_the_same_token_and_bos_is_never_added(image_processor):
    tokenizer = fit_tokenizer(tokenizer_with(eos_token=END, bos_token=BEGIN), config_with())
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    labels = VLVProcessor(image_processor, tokenizer)(suffix=["a", "a small dog"]).labels
    dog = [WORDS.index(word) for word in ("a", "small", "dog")]
    assert labels.tolist() == [[dog[0], WORDS.index(END), -100, -100], [*dog, WORDS.index(END)]]


def test_a_tokenizer_with_more_tokens_than_embeddings_is_an_error():
    model = AutoModelForCausalLM.from_config(language_model_config())
    tokenizer = tokenizer_with(eos_token=WORDS[3])
    check_tokenizer(tokenizer, model)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<{i}>" for i in range(VOCABULARY)]})
    check_tokenizer(tokenizer, model)  # no caption has them
    tokenizer.add_tokens(["zebra"])
    with pytest.raises(
        ValueError, match=r"does not belong to the language model big/one: its token 'zebra' has the id"
    ):
        check_tokenizer(tokenizer, model, "big/one")


def test_a_tokenizer_that_ends_texts_where_the_model_does_not_stop_is_an_error():
    model = AutoModelForCausalLM.from_config(language_model_config())
    tokenizer = tokenizer_with(eos_token=WORDS[5])
    with pytest.raises(
        ValueError, match=r"ends texts with .* \(id 5\), but the model stops at 3 .*; use the language"
    ):
        check_tokenizer(tokenizer, model)
    model.generation_config.eos_token_id = [3, 5]
    check_tokenizer(tokenizer, model)


def test_a_captioner_with_the_tokenizer_of_another_model_is_an_error(image_processor, tmp_path):
    config = language_model_config()
    config.vocab_size = 20
    torch.manual_seed(0)
    VLVForConditionalGeneration(vlv_config(text_config=config)).save_pretrained(tmp_path)
    image_processor.save_pretrained(tmp_path)
    build_tokenizer(for_text_encoder=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"its token .* has the id \d+, but the model has embeddings of 20 tokens"):
        hub.load_captioner(tmp_path)
