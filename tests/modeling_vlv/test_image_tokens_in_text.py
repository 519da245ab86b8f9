"""The processor makes sequences with image tokens, as other vision-language processors do."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedTokenizerFast,
)

from vlv import VLVForConditionalGeneration, VLVProcessor, hub
from vlv.miniature.tokenizer import build_tokenizer
from vlv.processing_vlv_captioner import IMAGE_TOKENS, LEGACY_CHAT_TEMPLATE
from vlv.train.data import Stage2Collator

from ..builders import QUERIES, VOCABULARY, language_model_config


def chat(image, *words: str) -> list[dict]:
    parts = [{"type": "image", "image": image}, *({"type": "text", "text": text} for text in words)]
    return [{"role": "user", "content": parts}]


def test_an_image_token_becomes_as_many_as_an_image_needs(processor, images):
    inputs = processor(images=images[:3], text=["<image>a large", "a<image><image>"])
    image, pad = [VOCABULARY] * QUERIES, processor.tokenizer.pad_token_id
    words = processor.tokenizer("a large").input_ids
    assert inputs["input_ids"].tolist() == [[pad] * (QUERIES - 1) + image + words, [words[0], *image, *image]]
    assert inputs["attention_mask"].sum(dim=1).tolist() == [QUERIES + 2, 2 * QUERIES + 1]
    assert len(inputs["pixel_values"]) == 3
    assert processor.decode(inputs["input_ids"][0], skip_special_tokens=True) == "a large"
    types = processor(images=images[0], text="<image>a", return_mm_token_type_ids=True)["mm_token_type_ids"]
    assert types.tolist() == [[1] * QUERIES + [0]]


def test_the_processor_tells_what_other_tools_ask(processor):
    assert (processor.image_token, processor.image_token_id) == ("<image>", VOCABULARY)
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == VOCABULARY
    counts = processor._get_num_multimodal_tokens(image_sizes=[(64, 64), (20, 30)])
    assert counts.num_image_tokens == [QUERIES] * 2 and counts.num_image_patches == [1, 1]


def test_captions_after_sequences_are_labels_as_long_as_the_input(processor, captioner, images):
    """And the loss is that of a text prefix with captions alone."""
    captions = ["a small dog", "a"]
    inputs = processor(images=images[:2], text=["<image>a", "<image>"], suffix=captions)
    ids, labels = inputs["input_ids"], inputs["labels"]
    counted = labels != -100
    assert labels.shape == ids.shape and torch.equal(labels[counted], ids[counted])
    assert [processor.decode(row[row != -100]) for row in labels] == ["a small dog </s>", "a </s>"]
    prefix = processor(images=images[:2], text=["a", ""], suffix=captions)
    with torch.no_grad():
        assert captioner(**inputs).loss.item() == pytest.approx(captioner(**prefix).loss.item(), rel=1e-5)
    cut = processor(images=images[:1], text="<image>", suffix=captions[:1], max_length=2, append_eos=False)
    assert cut["labels"][0, QUERIES:].tolist() == processor.tokenizer("a small").input_ids
    padded = processor(images=images[:1], text="<image>", suffix="a", max_length=6, pad_to_max_length=True)
    assert padded["labels"].shape == padded["input_ids"].shape == (1, QUERIES + 6)


@pytest.mark.parametrize(
    ("count", "text", "message"),
    [
        (1, "<image><image>", r"2 image tokens \(<image>\) for 1 images"),
        (3, ["<image>", "a"], "1 image tokens .* for 3 images"),
        (0, "<image>", "1 image tokens .* for 0 images"),
    ],
)
def test_numbers_of_images_and_image_tokens_that_differ_are_an_error(processor, images, count, text, message):
    with pytest.raises(ValueError, match=message):
        processor(images=images[:count] or None, text=text)


def test_images_in_lists_belong_to_the_text_of_their_list(processor, images):
    texts = ["<image>a<image>", "<image>"]
    lists = processor(images=[images[:2], images[2:3]], text=texts)
    flat = processor(images=images[:3], text=texts)
    assert torch.equal(lists["pixel_values"], flat["pixel_values"])
    assert torch.equal(lists["input_ids"], flat["input_ids"])
    with pytest.raises(ValueError, match=r"text 0 has 2 image tokens \(<image>\), but its list has 1 images"):
        processor(images=[images[:1], images[1:3]], text=texts)
    with pytest.raises(ValueError, match="1 lists of images for 2 texts; give each text its list"):
        processor(images=[images[:3]], text=texts)


@pytest.mark.parametrize(
    "arguments",
    [
        {"truncation": True},
        {"padding": "max_length"},
        {"padding": False},
        {"padding_side": "left"},
        {"pad_to_multiple_of": 8},
        {"return_mm_token_type_ids": True},
    ],
    ids=str,
)
def test_arguments_that_a_suffix_does_not_follow_are_an_error(processor, images, arguments):
    own = {"images": images[0], "text": "<image>a", "suffix": "a dog"}
    message = rf"{next(iter(arguments))}=.* does not work with suffix after image tokens"
    with pytest.raises(ValueError, match=message):
        processor(**own, **arguments)
    with pytest.raises(ValueError, match=message):
        processor(**own, text_kwargs=arguments)
    followed = {"padding": True, "padding_side": "right", "truncation": False}
    assert torch.equal(processor(**own, **followed)["labels"], processor(**own)["labels"])


def test_a_processor_that_does_not_know_the_number_of_tokens_says_how_to_set_it(image_processor, images):
    processor = VLVProcessor(image_processor, build_tokenizer(for_text_encoder=False))
    with pytest.raises(ValueError, match=r"set processor.image_seq_length = model.config.num_query_tokens"):
        processor(images=images[0], text="<image>")


@pytest.mark.parametrize("token", IMAGE_TOKENS)
def test_a_placeholder_that_the_vocabulary_has_is_the_image_token(image_processor, token):
    tokenizer = build_tokenizer(for_text_encoder=False)
    tokenizer.add_tokens(["<other>", token, "<more>"], special_tokens=True)
    processor = VLVProcessor(image_processor, tokenizer, image_seq_length=2)
    assert (processor.image_token, processor.image_token_id) == (token, VOCABULARY + 1)
    assert len(tokenizer) == VOCABULARY + 3
    assert processor.apply_chat_template(chat(None, "a")) == token + "a"


def test_ids_of_chats_are_lists_without_padding_unless_tensors_are_asked_for(processor, images):
    """GRPO in TRL pads them itself, and counts every id as a word."""
    chats = [chat(images[0], "a large"), chat(images[1])]
    settings = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    lists = processor.apply_chat_template(chats, **settings)
    assert list(map(len, lists["input_ids"])) == [QUERIES + 2, QUERIES] == list(map(sum, lists["attention_mask"]))
    tensors = processor.apply_chat_template(chats, **settings, return_tensors="pt")
    assert tensors["input_ids"].shape == (2, QUERIES + 2)
    assert tensors["attention_mask"].tolist()[1][:3] == [0, 0, 1]
    right = processor.apply_chat_template(
        chats, **settings, return_tensors="pt", processor_kwargs={"padding": True, "padding_side": "right"}
    )
    assert right["attention_mask"].tolist()[1][-3:] == [1, 0, 0]


def test_the_assistants_words_and_their_end_are_what_is_learnt(processor, images):
    answered = [*chat(images[0], "a"), {"role": "assistant", "content": "a small dog"}]
    inputs = processor.apply_chat_template(
        answered, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids = [i for i, learnt in zip(inputs["input_ids"][0], inputs["assistant_masks"][0], strict=True) if learnt]
    assert processor.decode(ids) == "a small dog </s>"
    prompt = processor.apply_chat_template(answered[:1], add_generation_prompt=True)
    assert processor.apply_chat_template(answered) == prompt + " a small dog</s>"


@pytest.fixture
def older(captioner, processor, tmp_path):
    """A captioner as version 0.2.0 saved it, without a word on image tokens."""
    captioner.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    build_tokenizer(for_text_encoder=False).save_pretrained(tmp_path)
    for name, field in (("config.json", "image_token_id"), ("processor_config.json", "image_seq_length")):
        content = json.loads((tmp_path / name).read_text())
        del content[field]
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "chat_template.jinja").write_text(LEGACY_CHAT_TEMPLATE)
    return tmp_path


@pytest.mark.parametrize("loader", ["hub", "transformers"])
def test_a_captioner_of_an_older_version_takes_chats_and_writes_the_same(older, captioner, images, loader):
    if loader == "hub":
        model, processor = hub.load_captioner(older)
    else:
        model = AutoModelForImageTextToText.from_pretrained(older).eval()
        processor = AutoProcessor.from_pretrained(older)
    assert model.config.image_token_id == processor.image_token_id == VOCABULARY
    assert processor.image_seq_length == QUERIES
    assert len(model.get_input_embeddings().weight) == VOCABULARY  # no new weight
    expected = captioner.generate(**processor(images=images[:1], text="a"), max_new_tokens=5)
    inputs = processor.apply_chat_template(
        chat(images[0], "a"), tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    written = model.generate(**inputs, max_new_tokens=5)
    assert torch.equal(written[:, inputs["input_ids"].shape[1] :], expected)


def test_an_export_names_the_image_token_and_leaves_the_model_as_it_is(captioner, processor, tmp_path):
    captioner.config.image_token_id = None
    hub.export(tmp_path, captioner=captioner, processor=processor)
    assert captioner.config.image_token_id is None
    assert json.loads((tmp_path / "config.json").read_text())["image_token_id"] == VOCABULARY


def test_a_model_and_a_tokenizer_of_different_image_tokens_are_an_error(older):
    config = json.loads((older / "config.json").read_text())
    (older / "config.json").write_text(json.dumps({**config, "image_token_id": 5}))
    with pytest.raises(ValueError, match=f"has image_token_id 5, but .* <image>, has the id {VOCABULARY}; make them"):
        hub.load_captioner(older)


def test_without_a_configured_token_ids_beyond_the_embeddings_are_image_tokens(captioner, processor, images):
    inputs = processor(images=images[:1], text="<image>a")
    expected = captioner.generate(**inputs, max_new_tokens=5)
    captioner.config.image_token_id = None
    assert torch.equal(captioner.generate(**inputs, max_new_tokens=5), expected)


def test_a_new_language_model_has_no_image_token_and_no_instructions_of_the_former_one(captioner, tmp_path):
    captioner.config.instructions = ["briefly"]
    captioner.save_pretrained(tmp_path)
    language_model = AutoModelForCausalLM.from_config(language_model_config())
    model = VLVForConditionalGeneration.from_vlv_text_pretrained(str(tmp_path), language_model)
    assert captioner.config.image_token_id == VOCABULARY and model.config.image_token_id is None
    assert model.config.instructions is None


def test_a_captioner_in_a_subfolder_finds_the_image_token_there(older, captioner, tmp_path):
    captioner.config.image_token_id = None
    captioner.save_pretrained(tmp_path / "part")
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).rename(tmp_path / "part" / name)
    model = VLVForConditionalGeneration.from_pretrained(tmp_path, subfolder="part")
    assert model.config.image_token_id == VOCABULARY


def test_a_captioner_without_a_processor_loads_and_a_damaged_processor_is_an_error(older):
    for path in older.glob("token*"):
        path.unlink()
    assert VLVForConditionalGeneration.from_pretrained(older).config.image_token_id is None
    (older / "processor_config.json").write_text("[]")
    with pytest.raises(AttributeError):
        VLVForConditionalGeneration.from_pretrained(older)


@pytest.mark.parametrize("loader", [VLVProcessor, AutoProcessor])
@pytest.mark.parametrize("count", [QUERIES, None])
def test_a_processor_without_a_model_beside_it_loads(image_processor, images, tmp_path, loader, count):
    """Without the number of image tokens, too, until it has to write some."""
    tokenizer = build_tokenizer(for_text_encoder=False)
    VLVProcessor(image_processor, tokenizer, image_seq_length=count).save_pretrained(tmp_path)
    processor = loader.from_pretrained(tmp_path)
    assert processor.image_seq_length == count
    assert processor(images=images[0], text="a").input_ids.shape == (1, 1)
    if count is None:
        with pytest.raises(ValueError, match=r"set processor.image_seq_length = model.config.num_query_tokens"):
            processor(images=images[0], text="<image>a")


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, for which a word with a space before it is another token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        special_tokens=["<end>"], initial_alphabet=alphabet, vocab_size=300, show_progress=False
    )
    backend.train_from_iterator(["briefly A dog", "A dog", "briefly:\nA dog"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


@pytest.mark.parametrize(("words", "same"), [("briefly:\n", True), ("", True), ("briefly", False)])
def test_an_answer_in_a_chat_of_a_byte_level_tokenizer_differs_from_stage_2_in_a_space_alone(
    image_processor, images, words, same
):
    """After words that end with a line break, and after none, it is what stage 2 trains on."""
    processor = VLVProcessor(image_processor, byte_level_tokenizer(), image_seq_length=2)
    pair = {"image": images[0], "caption": "A dog", **({"prompt": words} if words else {})}
    batch = Stage2Collator(processor, 20)([pair])
    prefix = batch["input_ids"][0].tolist() if words else []
    trained, tokenizer = prefix + batch["labels"][0].tolist(), processor.tokenizer
    messages = [*chat(images[0], words), {"role": "assistant", "content": "A dog"}]
    ids = processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"][0][2:]
    suffixed = processor(images=images[0], text=f"<image>{words}", suffix="A dog")["input_ids"][0, 2:].tolist()
    assert suffixed == trained and (ids == trained) == same
    assert tokenizer.decode(ids) == (words if same else words + " ") + "A dog<end>"
    other = [(a, b) for a, b in zip(ids, trained, strict=True) if a != b]
    assert [tuple(map(tokenizer.decode, pair)) for pair in other] == ([] if same else [(" A", "A")])
