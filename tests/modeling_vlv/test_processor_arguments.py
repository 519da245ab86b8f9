"""VLVProcessor takes the arguments that transformers' processors take, and refuses those that it does not know."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

from vlv import VLVProcessor

from ..builders import assert_close_to_scale

TEXTS = ["a large dog", "a"]


def test_padding_to_a_length_is_the_tokenizers(processor):
    batch = processor(text=TEXTS, padding="max_length", max_length=6)
    assert batch.input_ids.shape == (2, 6)
    assert batch.attention_mask.tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1]]
    nested = processor(text=TEXTS, text_kwargs={"padding": "max_length", "max_length": 6})
    assert torch.equal(nested.input_ids, batch.input_ids)


def test_a_text_prefix_is_cut_only_when_asked(processor):
    assert processor(text="a large dog", max_length=2).input_ids.shape == (1, 3)
    cut = processor(text="a large dog", truncation=True, max_length=2).input_ids
    assert processor.batch_decode(cut) == ["a large"]


def test_without_padding_rows_keep_their_lengths(processor):
    rows = processor(text=TEXTS, padding=False, return_tensors=None)["input_ids"]
    assert [len(row) for row in rows] == [3, 1]


def test_what_else_the_tokenizer_returns_is_returned(processor):
    assert processor(text="a large", return_offsets_mapping=True)["offset_mapping"].shape == (1, 2, 2)


@pytest.mark.parametrize("return_tensors", ["pt", "np", None])
def test_the_kind_of_tensors_is_the_one_asked_for(processor, images, return_tensors):
    batch = processor(images=images[:2], text=TEXTS, suffix=TEXTS, return_tensors=return_tensors)
    kind = {"pt": torch.Tensor, "np": np.ndarray, None: list}[return_tensors]
    assert {name: type(values) for name, values in batch.items()} == dict.fromkeys(
        ("pixel_values", "input_ids", "attention_mask", "labels"), kind
    )
    assert np.asarray(batch["labels"]).tolist() == processor(suffix=TEXTS).labels.tolist()


def test_labels_are_padded_to_a_length_when_asked(processor):
    labels = processor(suffix=TEXTS, max_length=6, pad_to_max_length=True).labels
    end = processor.tokenizer.eos_token_id
    assert labels.shape == (2, 6) and labels[1, 1:].tolist() == [end, -100, -100, -100, -100]
    assert labels[:, -1].tolist() == [-100, -100]
    unended = processor(suffix=TEXTS, append_eos=False).labels
    assert unended.shape == (2, 3) and end not in unended


def test_a_padding_token_that_occurs_in_a_caption_is_a_label(image_processor):
    """Many language models have no padding token and pad with EOS: only padding is ignored, not the caption's end."""
    tokenizer = _byte_tokenizer()
    processor = VLVProcessor(image_processor, tokenizer)
    assert processor.tokenizer.pad_token == tokenizer.eos_token
    labels = processor(suffix=["ab", "a"]).labels
    assert labels.tolist() == [[0, 1, 2], [0, 2, -100]]


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = GPT2Tokenizer(vocab={"a": 0, "b": 1, "<|endoftext|>": 2}, merges=[])
    tokenizer.pad_token = None
    return tokenizer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sufix": "a"}, r"unknown argument 'sufix'; did you mean 'suffix'\?"),
        ({"imagesize": 3}, "unknown argument 'imagesize'"),
        ({"generation_config": None}, "unknown argument 'generation_config'"),
        ({"text_kwargs": {"paddin": True}}, r"unknown argument 'paddin'; did you mean 'padding'\?"),
        ({"images_kwargs": {"do_normalise": True}}, r"'do_normalise'; did you mean 'do_normalize'\?"),
    ],
)
def test_an_unknown_argument_is_an_error(processor, images, arguments, message):
    with pytest.raises(TypeError, match=message):
        processor(images=images[0], **arguments)


def test_an_argument_given_twice_is_an_error(processor, images):
    with pytest.raises(ValueError, match="passed two times"):
        processor(images=images[0], do_normalize=True, images_kwargs={"do_normalize": False})


def test_videos_and_audio_are_refused(processor, images):
    with pytest.raises(ValueError, match="not videos or audio"):
        processor(images=images[0], videos=[[images[0]]])


def test_image_arguments_reach_the_image_processor(processor, images):
    plain = processor(images=images[0]).pixel_values
    raw = processor(images=images[0], do_normalize=False, do_rescale=False).pixel_values
    assert raw.max() > 100 and plain.max() < 10
    small = processor(images=images[0], images_kwargs={"size": {"height": 16, "width": 24}}).pixel_values
    assert small.shape == (1, 3, 16, 24)
    last = processor.image_processor(images[0], data_format="channels_last", return_tensors="pt").pixel_values
    assert torch.equal(last.permute(0, 3, 1, 2), plain)


def test_values_that_are_rescaled_already_are_not_rescaled_again(processor):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    expected = processor(images=image).pixel_values
    floats = np.asarray(image, dtype=np.float32) / 255
    assert_close_to_scale(processor(images=floats, do_rescale=False).pixel_values, expected)
    assert_close_to_scale(processor(images=floats).pixel_values, expected)


def test_a_centre_crop_takes_the_middle_of_the_resized_image(processor, images):
    whole = processor(images=images[1]).pixel_values
    crop = processor(images=images[1], do_center_crop=True, crop_size={"height": 32, "width": 48}).pixel_values
    assert torch.equal(crop, whole[:, :, 16:48, 8:56])
    larger = processor(images=images[1], do_center_crop=True, crop_size=80).pixel_values
    assert torch.equal(larger[:, :, 8:72, 8:72], whole)
    black = processor(images=Image.new("RGB", (64, 64))).pixel_values[0, :, 0, 0]
    assert torch.equal(larger[0, :, 0, 0], black)
    with pytest.raises(ValueError, match="crop_size"):
        processor(images=images[1], do_center_crop=True)


def test_padding_is_zero_and_at_the_bottom_and_the_right(processor, images):
    whole = processor(images=images[:2]).pixel_values
    padded = processor(images=images[:2], do_pad=True, pad_size={"height": 80, "width": 72}).pixel_values
    assert padded.shape == (2, 3, 80, 72) and torch.equal(padded[:, :, :64, :64], whole)
    assert padded[:, :, 64:].eq(0).all() and padded[:, :, :, 64:].eq(0).all()
    last = processor.image_processor(
        images[:2], do_pad=True, pad_size=80, data_format="channels_last", return_tensors="pt"
    ).pixel_values
    assert last.shape == (2, 80, 80, 3)
    with pytest.raises(ValueError, match="pad_size"):
        processor(images=images[0], do_pad=True, pad_size=32)


def test_images_of_different_sizes_are_padded_to_the_largest(processor):
    pair = [Image.new("RGB", (8, 16), "red"), Image.new("RGB", (24, 4), "red")]
    batch = processor(images=pair, do_resize=False, do_pad=True).pixel_values
    assert batch.shape == (2, 3, 16, 24)
    assert batch[0, 0, :, 8:].eq(0).all() and batch[1, 0, :4].ne(0).all()
