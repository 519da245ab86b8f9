"""The captioning pipeline gives the same captions for single images, lists, streams and batches."""

import pytest
import torch
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

from vlv.pipelines import VLVCaptioningPipeline, generate_captions


@pytest.fixture
def pipe(captioner, processor):
    captioner.generation_config.max_new_tokens = 5
    return VLVCaptioningPipeline(model=captioner, processor=processor)


def captions(rows: list[list[dict[str, str]]]) -> list[list[str]]:
    return [[entry["generated_text"] for entry in row] for row in rows]


def test_one_image_a_list_a_generator_and_a_dataset_agree(pipe, images):
    one_by_one = [pipe(image) for image in images]
    assert len({row[0]["generated_text"] for row in one_by_one}) > 4  # or nothing below could fail
    assert all(list(row[0]) == ["generated_text"] for row in one_by_one)
    assert pipe(images, batch_size=3) == one_by_one
    assert list(pipe(image for image in images)) == one_by_one
    data = KeyDataset([{"image": image} for image in images], "image")
    assert list(pipe(data, batch_size=2)) == one_by_one


def test_captions_are_those_of_generate(pipe, captioner, processor, images):
    ids = captioner.generate(processor(images=images[:2]).pixel_values)
    expected = [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
    assert captions(pipe(images[:2])) == [[text] for text in expected]


def test_paths_bytes_and_caption_embeds_are_images_too(pipe, captioner, processor, images, tmp_path):
    images[0].save(tmp_path / "a.png")
    expected = pipe(images[0])
    assert pipe(str(tmp_path / "a.png")) == expected
    assert pipe((tmp_path / "a.png").read_bytes()) == expected
    with torch.no_grad():
        z = captioner.model.get_caption_embeds(processor(images=images[0]).pixel_values)
    assert pipe({"caption_embeds": z[0]}) == expected


def test_each_image_has_num_return_sequences_captions_of_beam_search(pipe, captioner, processor, images):
    settings = {"num_beams": 3, "num_return_sequences": 2, "min_new_tokens": 3}
    rows = pipe(images[:2], batch_size=2, max_new_tokens=3, generate_kwargs=settings)
    pixel_values = processor(images=images[:2]).pixel_values
    expected = generate_captions(captioner, processor, pixel_values=pixel_values, max_new_tokens=3, **settings)
    assert captions(rows) == [expected[:2], expected[2:]]
    assert len(set(expected)) == 4  # or their order could be wrong


def test_a_caption_continues_the_text(pipe, captioner, processor, images):
    inputs = processor(images=images[0], text="a large")
    ids = captioner.generate(**inputs, max_new_tokens=3)
    expected = processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
    assert pipe(images[0], text="a large", max_new_tokens=3) == [{"generated_text": expected}]
    assert pipe(images[0], max_new_tokens=3) != [{"generated_text": expected}]


def test_errors_name_the_cause(pipe, images):
    with pytest.raises(ValueError, match=r"unknown arguments \['prompt'\]"):
        pipe(images[0], prompt="what is this?")
    with pytest.raises(ValueError, match="given twice"):
        pipe(images[0], max_new_tokens=2, generate_kwargs={"max_new_tokens": 3})
    with pytest.raises(ValueError, match="image in a format"):
        pipe(b"not an image")
    with pytest.raises(ValueError, match=r"caption_embeds of one image must be \(8, 32\), got \(1, 3, 32\)"):
        pipe({"caption_embeds": torch.zeros(3, 32)})


def test_the_built_in_task_works_with_text_and_with_chat(captioner, processor, images):
    built_in = pipeline("image-text-to-text", model=captioner, processor=processor)
    plain = built_in(images=images[0], text="", max_new_tokens=4)[0]["generated_text"]
    chat = [{"role": "user", "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": ""}]}]
    answered = built_in(chat, max_new_tokens=4)[0]["generated_text"][-1]["content"]
    own = VLVCaptioningPipeline(model=captioner, processor=processor)(images[0], max_new_tokens=4)
    assert plain.strip() == answered.strip() == own[0]["generated_text"]
