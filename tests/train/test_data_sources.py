"""Every kind of file that people have is a source: lists, parquet, tar shards. What is wrong in one is named."""

import csv
import json
import logging
import pickle
import re
import shlex
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from vlv.train import ColumnDataset, Stage2Config, load_images, load_pairs
from vlv.train.census import caption_statistics
from vlv.train.data import (
    TarSource,
    stored,
)
from vlv.train.parsing import parse_config

from .data_files import encoded, write_parquet, write_tar

CAPTIONS = ["a dog", "a cat", "an apple"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three images in a folder, two of them in a folder below."""
    for number, name in enumerate(("0.png", "sub/1.png", "sub/2.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (number * 50, 0, 0)).save(tmp_path / name)
    return tmp_path


NAMES = ["0.png", "sub/1.png", "sub/2.png"]


def rows(image: str, caption: str) -> list[dict]:
    return [{image: name, caption: text} for name, text in zip(NAMES, CAPTIONS, strict=True)]


def write_csv(path: Path, table: list[dict], delimiter: str) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(table)


def coco() -> dict:
    images = [{"id": number, "file_name": name} for number, name in enumerate(NAMES)]
    return {"images": images, "annotations": [{"image_id": n, "caption": c} for n, c in enumerate(CAPTIONS)]}


WRITERS = {
    "list.jsonl": lambda path: path.write_text("\n".join(map(json.dumps, rows("file_name", "caption")))),
    "other.jsonl": lambda path: path.write_text("\n".join(map(json.dumps, rows("image", "text")))),
    "metadata.csv": lambda path: write_csv(path, rows("file_name", "text"), ","),
    "list.tsv": lambda path: write_csv(path, rows("image_path", "caption"), "\t"),
    "captions.json": lambda path: path.write_text(json.dumps(dict(zip(NAMES, CAPTIONS, strict=True)))),
    "scored.json": lambda path: path.write_text(
        json.dumps({name: {"caption": own, "score": 0.2} for name, own in zip(NAMES, CAPTIONS, strict=True)})
    ),
    "rows.json": lambda path: path.write_text(json.dumps(rows("image", "caption"))),
    "coco.json": lambda path: path.write_text(json.dumps(coco())),
    "list.parquet": lambda path: parquet.write_table(pa.Table.from_pylist(rows("file_name", "text")), path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_list_file_is_a_source_and_its_paths_start_from_its_folder(folder, name, monkeypatch, tmp_path_factory):
    WRITERS[name](folder / name)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    expected = [{"image": str(folder / n), "caption": c} for n, c in zip(NAMES, CAPTIONS, strict=True)]
    pairs = load_pairs(str(folder / name))
    assert list(pairs) == expected
    assert list(load_images(str(folder / name))) == [{"image": item["image"]} for item in expected]
    (folder / name).rename(Path(name))
    assert list(load_pairs(name, image_root=folder)) == expected
    if name != "list.parquet":
        with pytest.raises(ValueError, match=r"0\.png does not exist; name the folder .* by --image_root"):
            load_pairs(name)


def test_a_folder_with_a_metadata_csv_has_its_captions_and_the_progress_of_vlv_caption_is_no_list(folder):
    WRITERS["metadata.csv"](folder / "metadata.csv")
    (folder / "captions.resume.jsonl").write_text('{"run": 0}\n')
    assert [item["caption"] for item in load_pairs(str(folder))] == CAPTIONS


def test_of_the_columns_caption_and_text_the_first_counts_and_another_is_named(folder, caplog):
    lines = [row | {"text": "other"} for row in rows("file_name", "caption")]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert load_pairs(str(folder / "list.jsonl"))[0]["caption"] == "a dog"
    assert "captions are those of the column 'caption', not of 'text'" in caplog.text
    assert load_pairs(str(folder / "list.jsonl"), caption_column="text")[0]["caption"] == "other"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "file_name,caption\n0.png,a dog, black\n", r"a\.csv, line 2: expected 2 columns"),
        ("a.csv", "link,caption\n0.png,a dog\n", r"a\.csv, line 2: .*\['link', 'caption'\], but no 'image'"),
        ("a.csv", "url,caption\nhttp://x/0.png,a dog\n", "'url' holds URLs, not images: download the images first"),
        ("a.jsonl", '{"image": "https://x/0.png", "caption": "a dog"}', "line 1: https://x/0.png is a URL; download"),
        ("a.jsonl", "[1]", r"a\.jsonl, line 1: expected an object, got a list"),
        ("a.json", "{", r"a\.json is not valid JSON"),
        ("a.json", '"x"', r"a\.json: expected \{name: caption\}"),
        ("a.jsonl", "", r"no pairs in .*a\.jsonl"),
        ("a.tar", "no tar file" * 100, r"a\.tar cannot be read as a tar file"),
        ("a.parquet", "no parquet", r"a\.parquet cannot be read as parquet"),
        ("a.docx", "x", r"a\.docx is neither a folder, a list"),
    ],
)
def test_what_is_wrong_in_a_list_is_named(folder, name, content, words):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=words):
        load_pairs(str(folder / name))


NOWHERE = ["nowhere/list.jsonl", "nowhere/data.tar", "nowhere/x.parquet", "a/*.tar", "sub/images", "my images/new"]


@pytest.mark.parametrize("name", NOWHERE)
def test_a_file_that_does_not_exist_is_said_at_once(name, folder, monkeypatch):
    monkeypatch.chdir(folder)  # which has a folder `sub`
    with pytest.raises(ValueError, match="does not exist"):
        load_pairs(name)


def test_tar_shards_give_images_and_captions_of_their_three_kinds(tmp_path, image_processor):
    kinds = {1: (".json", b'{"caption": "of json"}'), 2: (".caption", b"first\nsecond"), 3: (".cls", b"7")}
    write_tar(tmp_path / "a" / "0.tar", range(3), kinds)
    write_tar(tmp_path / "b" / "1.tar", range(3, 6), kinds)
    for source in (tmp_path, tmp_path / "*" / "*.tar"):
        pairs = load_pairs(str(source))
        assert [item["caption"] for item in pairs] == ["caption 0", "of json", "first", "caption 4", "caption 5"]
        pixels = [image_processor.load(item["image"]).getpixel((0, 0)) for item in pairs]
        assert pixels == [(number, 0, 0) for number in (0, 1, 2, 4, 5)]
    assert len(load_images(str(tmp_path))) == 6
    assert load_images(str(tmp_path))[5]["image"].name == f"{tmp_path}/b/1.tar:0005.png"


def test_an_empty_tar_file_before_others_moves_no_sample(tmp_path):
    write_tar(tmp_path / "0.tar", range(0))
    write_tar(tmp_path / "1.tar", range(4), {1: (".cls", b"7")})
    write_tar(tmp_path / "2.tar", range(4, 6))
    pairs = load_pairs(str(tmp_path))
    assert pairs.parts[0].shard_ends().tolist() == [0, 3, 5]
    captions = sorted(pairs[0, int(place)]["caption"] for place in pairs.order(0, batch_size=2))
    assert captions == [f"caption {n}" for n in (0, 2, 3, 4, 5)]


def test_the_column_of_captions_in_tar_files_is_said_once(tmp_path, caplog):
    for name, numbers in (("0", range(4)), ("1", range(4, 8))):
        write_tar(tmp_path / f"{name}.tar", numbers, dict.fromkeys(numbers, (".json", b'{"text": "a dog"}')))
    assert [item["caption"] for item in load_pairs(str(tmp_path))] == ["a dog"] * 8
    assert caplog.text.count("'text' takes its place") == 1


def test_indexes_of_files_that_together_take_long_are_stored_by_one_of_several_callers(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("VLV_DATA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stored, "MIN_SECONDS", 0.05)
    monkeypatch.setattr(stored, "SECONDS_BETWEEN_MESSAGES", 0.06)
    files = [str(tmp_path / f"{number}.bin") for number in range(5)]
    for file in files:
        Path(file).write_bytes(b"")
    computed = []

    def compute(number: int) -> dict:
        computed.append(number)
        time.sleep(0.02)
        return {"number": np.array(number)}

    with ThreadPoolExecutor(3) as threads:
        results = list(threads.map(lambda _: stored.stored_arrays(files, "things", compute), range(3)))
    assert [[int(arrays["number"]) for arrays in found] for found in results] == [[0, 1, 2, 3, 4]] * 3
    assert computed == [0, 1, 2, 3, 4] and len(list((tmp_path / "cache").glob("*.npz"))) == 5
    assert f"reading the things of {files[0]}, ...: " in caplog.text


def test_an_index_is_stored_and_a_changed_file_is_indexed_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("VLV_DATA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stored, "MIN_SECONDS", 0)
    write_tar(tmp_path / "0.tar", range(3))
    assert len(TarSource([tmp_path / "0.tar"], None)) == 3
    (index,) = (tmp_path / "cache").glob("*.npz")
    monkeypatch.setattr("tarfile.open", None)  # it is not read again
    assert len(TarSource([tmp_path / "0.tar"], None)) == 3
    index.write_bytes(index.read_bytes()[:100])
    monkeypatch.undo()
    monkeypatch.setenv("VLV_DATA_CACHE", str(tmp_path / "cache"))
    assert len(TarSource([tmp_path / "0.tar"], None)) == 3
    write_tar(tmp_path / "0.tar", range(4))
    assert len(TarSource([tmp_path / "0.tar"], None)) == 4


def test_parquet_rows_are_read_group_by_group_when_they_are_needed(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", range(6), 2)
    write_parquet(tmp_path / "b.parquet", range(6, 9), 3)
    pairs = load_pairs(str(tmp_path))
    (part,) = pairs.parts
    assert list(part.source.shard_sizes()) == [2, 2, 2, 3]
    read = []
    original = part.source._read
    monkeypatch.setattr(part.source, "_read", lambda *args: read.append(args[:2]) or original(*args))
    assert [pairs[n]["caption"] for n in (0, 1, 8, 7, 0)] == [f"caption {n}" for n in (0, 1, 8, 7, 0)]
    assert read == [(0, 0), (1, 0)]
    assert pairs.name(7) == f"{tmp_path}/b.parquet, row 1"


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_fingerprint_of_shards_changes_with_their_content_and_not_with_their_folder(tmp_path, kind):
    def write(folder: str, start: int) -> str:
        path = tmp_path / folder / f"0.{kind}"
        write_tar(path, range(start, start + 4)) if kind == "tar" else write_parquet(path, range(start, start + 4), 2)
        return load_pairs(str(tmp_path / folder)).fingerprint()

    assert write("a", 0) == write("b", 0) != write("c", 1)


def test_a_downloaders_metadata_beside_its_images_and_tars_is_left_out(tmp_path, folder, caplog):
    table = pa.Table.from_pylist([{"url": "http://x", "key": "0000", "caption": "a dog", "status": "success"}])
    write_tar(tmp_path / "tars" / "0.tar", range(2))
    parquet.write_table(table, tmp_path / "tars" / "0.parquet")
    assert len(load_pairs(str(tmp_path / "tars"))) == 2
    for name, caption in zip(NAMES, CAPTIONS, strict=True):
        (folder / "sub" / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).with_suffix(".txt").write_text(caption)
    parquet.write_table(table, folder / "sub" / "0.parquet")
    caplog.set_level(logging.INFO)
    (tmp_path / "tars" / "0.tar").unlink()
    (tmp_path / "tars" / "0.parquet").unlink()
    assert [item["caption"] for item in load_pairs(str(folder))] == CAPTIONS
    assert "is left out as a downloader's metadata" in caplog.text
    (folder / "sub" / "0.parquet").unlink()


def test_a_downloaders_metadata_given_itself_names_its_images_by_key(tmp_path, caplog):
    rows = [{"url": f"http://x/{n}", "key": f"{n:04}", "caption": f"caption {n}"} for n in range(3)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "00000.parquet")
    (tmp_path / "00000").mkdir()
    for number in (0, 2):  # the second could not be downloaded
        (tmp_path / "00000" / f"{number:04}.jpg").write_bytes(encoded(number))
    assert list(load_pairs(str(tmp_path / "00000.parquet"))) == [
        {"image": f"{tmp_path}/00000/{n:04}.jpg", "caption": f"caption {n}"} for n in (0, 2)
    ]
    assert "1 of 3 rows have no image" in caplog.text


def test_arrays_in_parquet_keep_their_dtype(tmp_path, image_processor):
    features = datasets.Features({"image": datasets.Array3D((6, 6, 3), "float32")})
    table = datasets.Dataset.from_dict({"image": [np.full((6, 6, 3), 0.5, np.float32)]}, features=features)
    table.to_parquet(tmp_path / "a.parquet")
    (item,) = load_images(str(tmp_path))
    assert item["image"].dtype == np.float32
    assert set(np.asarray(image_processor.load(item["image"])).ravel().tolist()) == {128}


def test_captions_that_are_empty_or_no_text_stop_the_run_if_asked(folder):
    lines = [*rows("file_name", "caption")[:2], {"file_name": NAMES[2], "caption": None}]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert len(load_pairs(str(folder))) == 2
    with pytest.raises(ValueError, match=r"1 of 3 captions are missing, empty or not text: .*2\.png"):
        load_pairs(str(folder), on_bad_caption="error")


def test_a_message_names_twenty_captions_that_are_left_out_and_the_census_all(tmp_path, processor, caplog):
    write_tar(tmp_path / "0.tar", range(26), dict.fromkeys(range(25), (".txt", b"")))
    pairs = load_pairs(str(tmp_path))
    (message,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert (
        "25 of 26 captions are missing or empty" in message
        and "0019.png, and 5 more" in message
        and "0020" not in message
    )
    found = caption_statistics(pairs, processor.tokenizer, max_tokens=8, append_eos=True)
    assert found["left_out"] == [f"{tmp_path}/0.tar:{n:04}.png" for n in range(25)]


def test_a_data_set_saved_by_datasets_is_a_source(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = {"image": [{"bytes": encoded(n), "path": None} for n in range(2)], "caption": ["a dog", "a cat"]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    pairs = load_pairs(str(tmp_path / "saved"))
    assert [item["caption"] for item in pairs] == ["a dog", "a cat"] and pairs[1]["image"] == encoded(1)


@pytest.mark.parametrize("kind", ["image", "bytes", "path", "captions"])
def test_one_changed_row_of_many_changes_the_fingerprint_and_another_folder_does_not(tmp_path, kind):
    """A row that is not among those that are read as a whole."""
    content = encoded(0)
    image = datasets.Value("binary") if kind == "bytes" else datasets.Image()
    caption = datasets.List(datasets.Value("string")) if kind == "captions" else datasets.Value("string")

    def fingerprint(folder: str, changed: int | None) -> str:
        contents = [content + b"." * (n == changed and kind in ("image", "bytes")) for n in range(200)]
        names = [f"{tmp_path}/{folder}/{n + 1000 * (n == changed and kind == 'path')}.png" for n in range(200)]
        texts = [["a", "b" if n == changed else "c"] if kind == "captions" else f"picture {n}" for n in range(200)]
        held = [None if kind == "path" else own for own in contents]
        images = [{"bytes": b, "path": p} for b, p in zip(held, names, strict=True)]
        rows = {"image": contents if kind == "bytes" else images, "caption": texts}
        table = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": image, "caption": caption}))
        return ColumnDataset(table, "image", "caption").fingerprint()

    if kind == "path":
        for folder in "ab":
            (tmp_path / folder).mkdir()
    assert fingerprint("a", None) == fingerprint("b", None) != fingerprint("a", 100)


@pytest.mark.parametrize("kind", ["tar", "parquet", "folder"])
def test_a_data_set_can_be_sent_to_spawned_workers_after_it_was_read(tmp_path, folder, kind):
    if kind == "tar":
        write_tar(tmp_path / "data" / "0.tar", range(3))
    elif kind == "parquet":
        write_parquet(tmp_path / "data" / "0.parquet", range(3), 2)
    dataset = load_images(str(folder if kind == "folder" else tmp_path / "data"), horizontal_flip=True)
    items = list(dataset)
    sent = pickle.loads(pickle.dumps(dataset))
    assert list(sent) == items and pickle.loads(pickle.dumps(items)) == items


DOCUMENT = Path(__file__).parents[2] / "docs" / "data.md"


def test_the_examples_of_the_document_work(tmp_path, monkeypatch):
    text = DOCUMENT.read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(DOCUMENT), "exec"), {})
    (settings,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (command,) = re.findall(r"vlv train stage2 CONFIG.yaml (--pairs .*)", text)
    Path("CONFIG.yaml").write_text(settings)
    parsed = [
        parse_config(Stage2Config, ["CONFIG.yaml", "--use_cpu", *options], "vlv train stage2").pairs
        for options in ([], shlex.split(command), ["--pairs", "photos"], ["--pairs=a", "--pairs", "b@2"])
    ]
    assert parsed == [["photos", "scans@0.5", "shards/*.tar@2"]] * 2 + ["photos", ["a", "b@2"]]
