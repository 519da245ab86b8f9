"""The captioning pipeline takes images one by one, in lists, in streams, and gives the same captions."""

import pytest
import torch
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

from vlv.pipelines import VLVCaptioningPipeline


@pytest.fixture
def pipe(captioner, processor):
    captioner.generation_config.max_new_tokens = 5
    return VLVCaptioningPipeline(model=captioner, processor=processor)


def test_one_image_a_list_a_generator_and_a_dataset_agree(pipe, pictures):
    one_by_one = [pipe(picture) for picture in pictures]
    assert len({row[0]["generated_text"] for row in one_by_one}) > 4  # or nothing below could fail
    assert all(list(row[0]) == ["generated_text"] for row in one_by_one)
    assert pipe(pictures, batch_size=3) == one_by_one
    assert list(pipe(picture for picture in pictures)) == one_by_one
    data = KeyDataset([{"image": picture} for picture in pictures], "image")
    assert list(pipe(data, batch_size=2)) == one_by_one


def test_captions_are_what_generate_writes(pipe, captioner, processor, pictures):
    ids = captioner.generate(processor(images=pictures[:2]).pixel_values)
    words = [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
    assert [row[0]["generated_text"] for row in pipe(pictures[:2])] == words


def test_paths_bytes_and_ready_embeddings(pipe, captioner, processor, pictures, tmp_path):
    pictures[0].save(tmp_path / "a.png")
    expected = pipe(pictures[0])
    assert pipe(str(tmp_path / "a.png")) == expected
    assert pipe((tmp_path / "a.png").read_bytes()) == expected
    with torch.no_grad():
        z = captioner.model.get_caption_embeds(processor(images=pictures[0]).pixel_values)
    assert pipe({"caption_embeds": z[0]}) == expected


def test_generation_settings(pipe, pictures):
    settings = {"num_beams": 3, "num_return_sequences": 2, "min_new_tokens": 3}
    rows = pipe(pictures[:2], batch_size=2, max_new_tokens=3, generate_kwargs=settings)
    assert [len(row) for row in rows] == [2, 2]
    assert (
        pipe(pictures[0], text="a large", max_new_tokens=2) == pipe([pictures[0]], text="a large", max_new_tokens=2)[0]
    )


def test_what_is_wrong_is_said(pipe, pictures):
    with pytest.raises(ValueError, match=r"unknown arguments \['prompt'\]"):
        pipe(pictures[0], prompt="what is this?")
    with pytest.raises(ValueError, match="given twice"):
        pipe(pictures[0], max_new_tokens=2, generate_kwargs={"max_new_tokens": 3})
    with pytest.raises(ValueError, match="no image in a format"):
        pipe(b"no image")


def test_the_built_in_task_works_with_text_and_with_chat(captioner, processor, pictures):
    built_in = pipeline("image-text-to-text", model=captioner, processor=processor)
    plain = built_in(images=pictures[0], text="", max_new_tokens=4)[0]["generated_text"]
    chat = [{"role": "user", "content": [{"type": "image", "image": pictures[0]}, {"type": "text", "text": ""}]}]
    answered = built_in(chat, max_new_tokens=4)[0]["generated_text"][-1]["content"]
    own = VLVCaptioningPipeline(model=captioner, processor=processor)(pictures[0], max_new_tokens=4)
    assert plain.strip() == answered.strip() == own[0]["generated_text"]
