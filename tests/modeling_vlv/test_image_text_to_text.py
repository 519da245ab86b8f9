"""transformers' own pipeline image-text-to-text takes every documented form of input with a VLV."""

import base64
import io

import pytest
import torch
from transformers import pipeline

from vlv import VLVProcessor
from vlv.miniature.tokenizer import build_tokenizer

from ..builders import QUERIES

GENERATION = {"max_new_tokens": 4, "return_full_text": False}


@pytest.fixture
def image(images):
    return images[0]


@pytest.fixture
def caption(captioner, processor):
    return pipeline("image-text-to-text", model=captioner, processor=processor)


@pytest.fixture
def expected(captioner, processor):
    """What the model writes after `text`."""

    def expected(image, text: str | None = None) -> str:
        ids = captioner.generate(**processor(images=image, text=text), max_new_tokens=4)
        return processor.decode(ids[0], skip_special_tokens=True)

    return expected


def user(image, *words: str) -> list[dict]:
    parts = [{"type": "image", "image": image}, *({"type": "text", "text": text} for text in words)]
    return [{"role": "user", "content": parts}]


def texts(results: list) -> list[str]:
    flat = [result for item in results for result in (item if isinstance(item, list) else [item])]
    return [result["generated_text"] for result in flat]


def data_uri(image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize("words", ["", "a large"])
@pytest.mark.parametrize(
    ("form", "is_chat"),
    [
        (lambda image, words: {"images": image, "text": words}, False),
        (lambda image, words: {"images": [image], "text": [words]}, False),
        (lambda image, words: {"images": {"images": image, "text": words}}, False),
        (lambda image, words: {"text": user(image, words)}, True),
        (lambda image, words: {"images": user(image, words)}, True),
        (lambda image, words: {"text": [user(image, words)]}, True),
        (
            lambda image, words: {"text": [{"role": "system", "content": "Describe the image."}, *user(image, words)]},
            True,
        ),
        (lambda image, words: {"text": user(image, words[:2], words[2:])}, True),
        (
            lambda image, words: {
                "text": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": data_uri(image)}},
                            {"type": "text", "text": words},
                        ],
                    }
                ]
            },
            True,
        ),
    ],
    ids=[
        "images and text",
        "lists",
        "mapping",
        "chat",
        "chat first",
        "chats",
        "system",
        "parts",
        "OpenAI",
    ],
)
def test_every_documented_form_is_captioned(caption, image, expected, form, is_chat, words):
    """After the words of a chat, as a part of the text that goes on, the new ones begin with a space."""
    gap = " " if is_chat and words else ""
    assert texts(caption(**form(image, words), **GENERATION)) == [gap + expected(image, words)]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_chats_with_and_without_words_make_a_batch(caption, images, expected, batch_size):
    words = [None, "a large", "a"]
    chats = [user(image, *([text] if text else [])) for image, text in zip(images, words, strict=False)]
    results = texts(caption(text=chats, batch_size=batch_size, **GENERATION))
    assert results == [
        (" " if text else "") + expected(image, text) for image, text in zip(images, words, strict=False)
    ]
    assert len(set(results)) == 3  # else no comparison could fail


def test_several_images_with_a_text_each_make_a_batch(caption, images, expected):
    words = ["", "a large", "a"]
    results = texts(caption(images=images[:3], text=words, **GENERATION))
    assert results == [expected(image, text) for image, text in zip(images, words, strict=False)]


def test_a_message_of_padding_alone_is_no_text(captioner, processor, images):
    inputs = processor(images=images[0])
    padding = {"input_ids": torch.tensor([[0]]), "attention_mask": torch.tensor([[0]])}
    assert torch.equal(captioner(**inputs, **padding).logits, captioner(**inputs).logits)


@pytest.mark.parametrize("given", [True, None])
def test_a_last_message_by_the_assistant_is_continued(caption, image, expected, given):
    chat = [*user(image), {"role": "assistant", "content": [{"type": "text", "text": "a large"}]}]
    assert texts(caption(text=chat, continue_final_message=given, **GENERATION)) == [" " + expected(image, "a large")]
    full = caption(text=chat, max_new_tokens=4)[0]["generated_text"]
    assert full[-1]["content"][-1]["text"] == "a large " + expected(image, "a large")


def several_images(images) -> list[dict]:
    chat = user(images[0], "a")
    chat[0]["content"] += user(images[1], "dog")[0]["content"]
    return chat


def several_turns(images) -> list[dict]:
    return [*user(images[0]), {"role": "assistant", "content": "a dog"}, *user(images[1], "a")]


@pytest.mark.parametrize("build", [several_images, several_turns])
def test_several_images_and_turns_are_refused_where_the_language_model_knows_no_dialogue(
    caption, processor, images, build
):
    message = "this one has 2 images and . messages .* the language model of this VLV has no chat template"
    with pytest.raises(ValueError, match=message):
        caption(text=build(images), **GENERATION)
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template([user(images[0]), build(images)], tokenize=True, return_dict=True)


CHATML = (
    "{% for message in messages %}<s> {{ message['role'] }} {{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} at{% endif %}"
)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (several_images, "<s> user <image>a<image>dog at"),
        (several_turns, "<s> user <image><s> assistant a dog<s> user <image>a at"),
        (lambda images: user(images[0], "a"), "<image>a"),  # as without dialogue
    ],
)
def test_several_images_and_turns_are_rendered_by_the_language_models_own_template(
    captioner, image_processor, images, build, expected, tmp_path
):
    tokenizer = build_tokenizer(for_text_encoder=False)
    tokenizer.chat_template = CHATML
    own = VLVProcessor(image_processor, tokenizer, image_seq_length=QUERIES)
    own.save_pretrained(tmp_path)
    chat = build(images)
    for processor in (own, VLVProcessor.from_pretrained(tmp_path)):
        assert processor.apply_chat_template(chat, add_generation_prompt=True) == expected
        caption = pipeline("image-text-to-text", model=captioner, processor=processor)
        inputs = processor(images=images[: expected.count("<image>")], text=expected)
        ids = captioner.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
        written = processor.decode(ids, skip_special_tokens=True)
        assert texts(caption(text=chat, **GENERATION)) == [" " + written]


def test_a_chat_without_an_image_is_refused(caption):
    with pytest.raises(ValueError, match="an image to caption is missing; words and chats need one"):
        caption(text=[{"role": "user", "content": [{"type": "text", "text": "a dog"}]}], **GENERATION)
