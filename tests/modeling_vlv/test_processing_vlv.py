"""Images of every kind become the expected pixels. Other inputs raise an error with the reason."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from vlv import VLVConfig, VLVImageProcessor, VLVProcessor
from vlv.processing_vlv import crop_to_square, to_rgb

from ..builders import assert_close_to_scale

RED = np.zeros((6, 8, 3), np.uint8)
RED[:, :4] = (255, 0, 0)  # left half red, right half black


def encoded(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "PNG", **options})
    return buffer.getvalue()


def test_an_image_in_every_accepted_form_gives_the_same_pixels(tmp_path):
    image = Image.fromarray(RED)
    image.save(tmp_path / "red.png")
    forms = [
        image,
        tmp_path / "red.png",
        str(tmp_path / "red.png"),
        encoded(image),
        bytearray(encoded(image)),
        RED,
        RED.transpose(2, 0, 1),
        RED.astype(np.float32) / 255,
        torch.from_numpy(RED),
        torch.from_numpy(RED).permute(2, 0, 1),
        torch.from_numpy(RED).permute(2, 0, 1).bfloat16() / 255,
        RED.astype(np.uint16) * 257,
    ]
    for form in forms:
        assert np.array_equal(np.asarray(to_rgb(form)), RED), type(form)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("1", (4, 4), 1), (255, 255, 255)),
        (Image.new("L", (4, 4), 100), (100, 100, 100)),
        (Image.new("LA", (4, 4), (0, 0)), (255, 255, 255)),  # transparent: white shows
        (Image.new("LA", (4, 4), (0, 255)), (0, 0, 0)),
        (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (255, 0, 0, 255)), (255, 0, 0)),
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.new("YCbCr", (4, 4), (255, 128, 128)), (255, 255, 255)),
        (Image.new("I;16", (4, 4), 257 * 80), (80, 80, 80)),
        (Image.new("I", (4, 4), 257 * 80), (80, 80, 80)),
        (Image.new("F", (4, 4), 0.5), (128, 128, 128)),
    ],
)
def test_images_of_every_mode_convert_to_rgb(image, expected):
    assert set(map(tuple, np.asarray(to_rgb(image)).reshape(-1, 3).tolist())) == {expected}


def test_transparent_palette_entries_become_white():
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((0, 0), 1)
    data = encoded(palette, transparency=0)
    image = to_rgb(data)
    assert image.getpixel((0, 0)) == (0, 255, 0) and image.getpixel((1, 1)) == (255, 255, 255)


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter to the right
    data = encoded(Image.fromarray(RED), format="JPEG", exif=exif, quality=95)
    image = to_rgb(data)
    assert image.size == (6, 8)
    assert image.getpixel((3, 1))[0] > 200 > 50 > image.getpixel((3, 6))[0]


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (1, 1), (5000, 3), (640, 480), (333, 777)])
def test_images_of_any_shape_are_resized(size):
    processor = VLVImageProcessor(size={"height": 32, "width": 32}, pre_crop_size=48)
    assert processor(Image.new("RGB", size, "red"), return_tensors="pt").pixel_values.shape == (1, 3, 32, 32)


def test_the_crop_of_a_long_image_agrees_with_resizing_first():
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (20, 20 * 17, 3), dtype=np.uint8))
    resized = image.resize((32 * 17, 32), Image.Resampling.BILINEAR)
    expected = np.asarray(resized.crop((256, 0, 288, 32))).astype(int)
    assert np.abs(np.asarray(crop_to_square(image, 32)).astype(int) - expected).max() <= 1


def test_pixels_are_resized_by_bicubic_and_normalised_by_imagenet(images):
    processor = VLVImageProcessor(size={"height": 24, "width": 40})
    pixels = processor(images[1], return_tensors="pt").pixel_values[0].permute(1, 2, 0).numpy()
    resized = np.asarray(images[1].resize((40, 24), Image.Resampling.BICUBIC)) / 255
    expected = (resized - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert_close_to_scale(torch.from_numpy(pixels), torch.from_numpy(expected))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("nowhere.png", "nowhere.png does not exist"),
        (b"", "empty"),
        (b"no image", "not an image in a format"),
        (encoded(Image.fromarray(RED.repeat(9, 0)))[:-40], "damaged"),
        (np.zeros((5, 5, 7), np.uint8), "1, 3 or 4 channels"),
        (np.zeros((0, 5, 3), np.uint8), "not an image"),
        (np.full((4, 4, 3), 3.0), "must lie in 0..1"),
        (np.full((4, 4, 3), np.nan), "must lie in 0..1"),
        (np.zeros((4, 4, 3), np.int64), "uint8, or float"),
        (Image.new("F", (4, 4), 2.0), "must lie in 0..1"),
        (None, "NoneType is not an image"),
        (7, "int is not an image"),
    ],
)
def test_an_input_that_is_not_an_image_is_named_with_the_reason(image, message, images):
    processor = VLVImageProcessor(size={"height": 16, "width": 16})
    with pytest.raises(ValueError, match=f"image 1 of 3: .*{message}"):
        processor([images[0], image, images[1]])
    with pytest.raises(ValueError, match="at least one image"):
        processor([])


def test_a_batch_array_is_a_list_of_images(processor):
    batch = np.random.default_rng(0).integers(0, 256, (3, 9, 9, 3), dtype=np.uint8)
    expected = processor(images=list(batch)).pixel_values
    assert torch.equal(processor(images=batch).pixel_values, expected)
    assert torch.equal(processor(images=torch.from_numpy(batch).permute(0, 3, 1, 2)).pixel_values, expected)


def test_a_text_prefix_has_no_eos_and_is_padded_on_the_left(processor, images):
    batch = processor(images=images[:2], text=["a large", "a"])
    assert processor.batch_decode(batch.input_ids, skip_special_tokens=True) == ["a large", "a"]
    assert batch.attention_mask.tolist() == [[1, 1], [0, 1]]
    assert processor.tokenizer.eos_token_id not in batch.input_ids
    assert processor(images=images[:2], text="").input_ids.shape == (2, 0)


def test_labels_end_with_eos_and_are_padded_with_minus_100(processor):
    labels = processor(suffix=["a small dog", "a"]).labels
    end = processor.tokenizer.eos_token_id
    assert labels[0, -1] == end and labels[1].tolist()[1:] == [end, -100, -100]
    cut = processor(suffix="a small dog", max_length=2).labels
    assert cut.shape == (1, 2) and end not in cut  # its end is not seen


@pytest.mark.parametrize(
    "content", ["a large", [{"type": "image"}, {"type": "text", "text": "a large"}], [{"type": "image"}]]
)
def test_the_chat_template_gives_the_image_and_the_users_text(processor, content):
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == "<image>" * ("image" in str(content)) + "a large" * ("a large" in str(content))


def test_a_processor_is_the_same_after_saving(tmp_path, processor, images):
    processor.save_pretrained(tmp_path)
    VLVConfig().save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, VLVProcessor) and isinstance(loaded.image_processor, VLVImageProcessor)
    assert loaded.chat_template == processor.chat_template
    before, after = (p(images=images, text="a", suffix=["dog"] * len(images)) for p in (processor, loaded))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_wrong_numbers_of_images_texts_and_captions_are_errors(processor, images):
    with pytest.raises(ValueError, match="1 texts for 2 images"):
        processor(images=images[:2], text=["a"])
    with pytest.raises(ValueError, match="3 captions for 2 images"):
        processor(images=images[:2], suffix=["a"] * 3)
    with pytest.raises(ValueError, match="give images, text or suffix"):
        processor()
