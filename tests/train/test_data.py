"""Images and pairs are read from folders, parquet files and data sets. Errors name the file that is wrong."""

import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from vlv.train import ColumnDataset, Stage1Collator, Stage2Collator, load_images, load_pairs

from ..builders import assert_close_to_scale


def item_pixels(dataset, image_processor) -> list[np.ndarray]:
    return [np.asarray(image_processor.load(dataset[i]["image"])) for i in range(len(dataset))]


@pytest.fixture
def parquet(tmp_path, image_folder):
    files = sorted(image_folder.rglob("*.png"))
    rows = {
        "image": [{"bytes": file.read_bytes(), "path": None} for file in files],
        "caption": [file.with_suffix(".txt").read_text().strip() for file in files],
    }
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(tmp_path / "pairs.parquet")
    return tmp_path / "pairs.parquet"


def test_folder_and_parquet_give_the_same_images_and_pairs(parquet, image_folder, image_processor):
    from_folder, from_parquet = load_pairs(str(image_folder)), load_pairs(str(parquet))
    assert len(from_folder) == len(from_parquet) == 16
    assert [row["caption"] for row in from_folder] == [row["caption"] for row in from_parquet]
    pixels = item_pixels(from_folder, image_processor)
    for other in (from_parquet, load_images(str(parquet)), load_images(str(image_folder))):
        assert all(np.array_equal(a, b) for a, b in zip(pixels, item_pixels(other, image_processor), strict=True))
    assert list(load_images(str(parquet))[0]) == ["image"]
    assert len(load_images(str(parquet.parent))) == 16  # a folder of parquet files


def test_a_jsonl_file_names_images_in_its_folder(tmp_path, images):
    (tmp_path / "sub").mkdir()
    images[0].save(tmp_path / "sub" / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "sub/a.png", "caption": "a dog"}\n\n')
    pairs = load_pairs(str(tmp_path))
    assert [dict(pairs[i]) for i in range(len(pairs))] == [{"image": str(tmp_path / "sub/a.png"), "caption": "a dog"}]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 is not valid JSON"),
        ('{"file_name": "a.png"}', "line 2: expected"),
        ('{"file_name": "b.png", "caption": "a dog"}', "line 2: .*b.png does not exist"),
    ],
)
def test_an_error_names_the_wrong_line(tmp_path, images, line, words):
    images[0].save(tmp_path / "a.png")
    (tmp_path / "list.jsonl").write_text('{"file_name": "a.png", "caption": "x"}\n' + line)
    with pytest.raises(ValueError, match=words):
        load_pairs(str(tmp_path))


def test_an_empty_jsonl_file_is_an_error_and_a_byte_order_mark_is_ignored(tmp_path, images):
    images[0].save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a dog")
    (tmp_path / "list.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"no pairs in .*list\.jsonl"):
        load_pairs(str(tmp_path))
    line = '{"file_name": "a.png", "caption": "a cat"}'
    (tmp_path / "list.jsonl").write_text(line, encoding="utf-8-sig")
    assert load_pairs(str(tmp_path))[0]["caption"] == "a cat"


def test_an_error_names_what_is_missing(tmp_path, images, parquet):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="no images in"):
        load_images(str(empty))
    images[0].save(empty / "alone.png")
    with pytest.raises(ValueError, match=r"no image in .* has a caption: expected files such as alone.txt"):
        load_pairs(str(empty))
    with pytest.raises(ValueError, match="no 'text'"):
        load_pairs(str(parquet), caption_column="text")
    with pytest.raises(ValueError, match=r"nowhere.parquet does not exist"):
        load_images("nowhere.parquet")


def test_image_paths_in_parquet_start_from_its_folder(tmp_path, images, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        images[0].save(tmp_path / name / "0.png")
        rows = {"image": ["0.png"], "caption": [name], "score": [1.0]}
        table = datasets.Dataset.from_dict(rows if name == "a" else {k: rows[k] for k in ("image", "caption")})
        table.to_parquet(tmp_path / name / "data.parquet")
    pairs = load_pairs(str(tmp_path))  # of the columns, only those in use have to be in every file
    assert [pairs[i] for i in range(2)] == [
        {"image": str(tmp_path / name / "0.png"), "caption": name} for name in ("a", "b")
    ]


def test_empty_captions_are_left_out_and_named(tmp_path, images, caplog):
    for number, caption in enumerate(("a dog", " \n", None)):
        images[number].save(tmp_path / f"{number}.png")
        if caption is not None:
            (tmp_path / f"{number}.txt").write_text(caption)
    assert [item["caption"] for item in load_pairs(str(tmp_path))] == ["a dog"]
    assert "2 of 3 captions are missing or empty and left out: " in caplog.text and "1.png" in caplog.text
    table = datasets.Dataset.from_dict({"image": ["x", "y"], "caption": [" ", "a cat"]})
    table.to_parquet(tmp_path / "t.parquet")
    pairs = load_pairs(str(tmp_path / "t.parquet"))
    assert len(pairs) == 1 and pairs[0]["caption"] == "a cat" and "row 0" in caplog.text
    (tmp_path / "0.txt").write_text("")
    (tmp_path / "t.parquet").unlink()
    with pytest.raises(ValueError, match="all 3 captions are missing or empty"):
        load_pairs(str(tmp_path))


@pytest.mark.parametrize(
    ("rule", "captions"),
    [
        ("first", ["a dog", "a cat"]),
        ("all", ["a dog", "ein Hund", "un chien", "a cat"]),
        ("whole", ["a dog\nein Hund\nun chien", "a cat"]),
    ],
)
def test_a_rule_says_which_lines_of_a_sidecar_count(tmp_path, images, caplog, rule, captions):
    for number, text in enumerate(("a dog\n\nein Hund\nun chien\n", "a cat\n")):
        images[number].save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(text)
    found = [item["caption"] for item in load_pairs(str(tmp_path), caption_lines=rule)]
    assert [" ".join(c.split()) for c in found] == [" ".join(c.split()) for c in captions]
    assert ("1 of 2 images have several captions (at most 3)" in caplog.text) == (rule != "whole")
    lines = [{"file_name": f"{number}.png", "text": text} for number, text in enumerate((["a dog", "", "b"], "a cat"))]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    entries = {"first": ["a dog", "a cat"], "all": ["a dog", "b", "a cat"], "whole": ["a dog\nb", "a cat"]}
    assert [item["caption"] for item in load_pairs(str(tmp_path), caption_lines=rule)] == entries[rule]


def test_a_caption_drawn_at_random_differs_between_epochs_and_not_between_runs(tmp_path, images):
    images[0].save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("a\nb\nc\n")
    first, again = (load_pairs(str(tmp_path), caption_lines="random", seed=3) for _ in range(2))
    drawn = [first[epoch, 0]["caption"] for epoch in range(20)]
    assert set(drawn) == {"a", "b", "c"} and drawn == [again[epoch, 0]["caption"] for epoch in range(20)]


@pytest.mark.parametrize("source", ["./nowhere", "nowhere", "/no/where", "a/b/c"])
def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(source):
    with pytest.raises(ValueError, match=f"{source} does not exist"):
        load_images(source)


def test_a_row_without_an_image_is_unreadable_and_ends_nothing(tmp_path, processor):
    rows = {"image": [{"bytes": b"", "path": None}], "caption": ["a dog"]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "t.parquet")
    pairs = load_pairs(str(tmp_path / "t.parquet"))
    with pytest.raises(ValueError, match="none of the 1 images"):
        Stage2Collator(processor, 30)([pairs[0]])


def test_a_fingerprint_of_data_depends_on_content_alone(tmp_path, parquet, image_folder):
    import shutil

    for source in (parquet, image_folder):
        moved = tmp_path / "moved" / source.name
        moved.parent.mkdir(exist_ok=True)
        shutil.copytree(source, moved) if source.is_dir() else shutil.copy(source, moved)
        assert load_pairs(str(source)).fingerprint() == load_pairs(str(moved)).fingerprint()
    (tmp_path / "moved" / image_folder.name / "a" / "1.txt").write_text("other words")
    moved = load_pairs(str(tmp_path / "moved" / image_folder.name))
    assert moved.fingerprint() != load_pairs(str(image_folder)).fingerprint()


def test_encoder_and_diffusion_model_get_the_same_crop(images):
    from vlv import VLVImageProcessor

    processor = VLVImageProcessor(
        size={"height": 32, "width": 32}, pre_crop_size=16, image_mean=[0.0] * 3, image_std=[1.0] * 3
    )
    batch = Stage1Collator(processor, diffusion_image_size=16)([{"image": p} for p in images])
    assert batch["pixel_values"].shape == (8, 3, 32, 32) and batch["diffusion_pixels"].shape == (8, 3, 16, 16)
    assert batch["diffusion_pixels"].dtype == torch.uint8
    cropped = processor.load(images[1])
    assert np.array_equal(batch["diffusion_pixels"][1].permute(1, 2, 0).numpy(), np.asarray(cropped))
    enlarged = np.asarray(cropped.resize((32, 32), Image.Resampling.BICUBIC)) / 255
    assert_close_to_scale(torch.as_tensor(batch["pixel_values"][1].permute(1, 2, 0)), torch.as_tensor(enlarged), 1e-6)


def test_captions_are_padded_to_the_longest_of_the_batch(processor, images):
    captions = ["a dog", "a large apple at the top left"]
    items = [{"image": p, "caption": c} for p, c in zip(images, captions, strict=False)]
    batch = Stage2Collator(processor, max_caption_tokens=300)(items)
    assert batch["labels"].shape == (2, 8)  # seven words and EOS
    assert batch["labels"][0].tolist()[2:] == [processor.tokenizer.eos_token_id] + [-100] * 5


def test_unreadable_items_are_skipped_logged_and_counted(processor, images, caplog):
    items = [{"image": images[0], "caption": "a dog"}, {"image": b"no image", "caption": "a cat"}]
    batch = Stage2Collator(processor, 30)(items)
    assert len(batch["pixel_values"]) == len(batch["labels"]) == 1
    assert batch["num_skipped"] == 1
    with pytest.raises(ValueError, match="is not an image in a format"):
        Stage2Collator(processor, 30, on_bad_image="error")(items)
    with pytest.raises(ValueError, match="none of the 1 images"):
        Stage2Collator(processor, 30)(items[1:])
    batch = Stage2Collator(processor, 30)([items[0], {"image": images[1], "caption": None}])
    assert len(batch["labels"]) == 1 and batch["num_skipped"] == 1
    assert "the caption is a NoneType" in caplog.text
    with pytest.raises(ValueError, match="'ignore'"):
        Stage2Collator(processor, 30, on_bad_image="ignore")


def test_a_batch_without_a_readable_item_repeats_the_last_readable_one(processor, images):
    collator = Stage2Collator(processor, 30)
    good = collator([{"image": images[0], "caption": "a dog"}])
    again = collator([{"image": b"no image", "caption": "a cat"}])
    assert again["num_skipped"] == 1
    assert torch.equal(again["pixel_values"], good["pixel_values"]) and torch.equal(again["labels"], good["labels"])
    with pytest.raises(ValueError, match="is this the right data"):
        for _ in range(200):
            collator([{"image": b"no image", "caption": "a cat"}])


def test_array_columns_keep_their_dtype(image_processor):
    features = datasets.Features({"image": datasets.Array3D((6, 6, 3), "float32")})
    table = datasets.Dataset.from_dict({"image": [np.full((6, 6, 3), 0.5, np.float32)]}, features=features)
    (pixels,) = item_pixels(ColumnDataset(table, "image", None), image_processor)
    assert set(pixels.ravel().tolist()) == {128}


def test_captions_are_read_from_text_files_beside_the_images(image_folder):
    pairs = load_pairs(str(image_folder))
    words = {json.dumps(pairs[i]["caption"]) for i in range(len(pairs))}
    assert words == {'"a small dog"', '"a large apple at the top left"'}
