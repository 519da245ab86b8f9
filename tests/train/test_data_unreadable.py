"""What cannot be read is counted and named, and what must not be read is refused."""

import base64
import io
import pickle
import tarfile
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import datasets
import huggingface_hub
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from vlv.train import load_images, load_pairs
from vlv.train.data import (
    ColumnDataset,
    Stage1Collator,
    Stage2Collator,
    StreamingDataset,
    StreamSource,
    readable_items,
    stored,
)

from .data_files import encoded, write_parquet, write_tar


def test_a_tar_file_that_is_cut_off_gives_the_samples_before_that(tmp_path, caplog):
    write_tar(tmp_path / "0.tar", range(5))
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[: 512 * 9 + 20])  # each member has a header and a block
    assert len(load_images(str(tmp_path))) == 2
    assert f"{tmp_path}/0.tar is cut off" in caplog.text


def test_members_behind_a_damaged_header_and_in_concatenated_tar_files_are_read(tmp_path, caplog):
    write_tar(tmp_path / "a.tar", range(5))
    data = bytearray((tmp_path / "a.tar").read_bytes())
    write_tar(tmp_path / "b.tar", range(3))
    (tmp_path / "a.tar").write_bytes(data + (tmp_path / "b.tar").read_bytes())
    pairs = load_pairs(str(tmp_path / "a.tar"))
    assert [item["caption"] for item in pairs] == [f"caption {n}" for n in (0, 1, 2, 3, 4, 0, 1, 2)]
    assert pairs[5]["image"] == pairs[0]["image"] and not caplog.text
    data[512 * 4 + 10] ^= 1  # in the header of 0001.png; each member has a header and a block
    (tmp_path / "a.tar").write_bytes(data)
    assert [item["caption"] for item in load_pairs(str(tmp_path / "a.tar"))] == [f"caption {n}" for n in (0, 2, 3, 4)]
    assert f"{tmp_path}/a.tar is damaged or cut off at byte 2048: 1024 bytes" in caplog.text
    (tmp_path / "a.tar").write_bytes(data[: 512 * 20])
    assert len(load_images(str(tmp_path / "a.tar"))) == 4
    assert f"{tmp_path}/a.tar has no end mark" in caplog.text


def test_an_unreadable_image_in_a_shard_is_called_by_its_name(tmp_path, image_processor, caplog):
    write_tar(tmp_path / "0.tar", range(2), {1: (".png", b"no image")})
    with tarfile.open(tmp_path / "0.tar", "a") as archive:
        member = tarfile.TarInfo("broken.jpg")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"abc"))
    batch = Stage1Collator(image_processor, 8)(list(load_images(str(tmp_path))))
    assert batch["num_skipped"] == 1
    assert f"skipped an image: {tmp_path}/0.tar:broken.jpg: 3 bytes is not an image" in caplog.text


def test_what_cannot_be_read_while_training_counts_as_an_unreadable_image(tmp_path, image_processor, caplog):
    write_parquet(tmp_path / "a" / "0.parquet", range(6), 2)
    group = parquet.read_metadata(tmp_path / "a" / "0.parquet").row_group(0)
    data = bytearray((tmp_path / "a" / "0.parquet").read_bytes())
    data[4 : 4 + group.total_byte_size // 2] = b"\xff" * (group.total_byte_size // 2)  # its first column
    (tmp_path / "a" / "0.parquet").write_bytes(data)
    write_tar(tmp_path / "b" / "0.tar", range(2))
    write_tar(tmp_path / "b" / "1.tar", range(2, 4))
    pairs = load_pairs([str(tmp_path / "a"), str(tmp_path / "b")])
    (tmp_path / "b" / "0.tar").unlink()
    pairs = pickle.loads(pickle.dumps(pairs))  # as a worker has it, without open files
    batch = Stage1Collator(image_processor, 8)(pickle.loads(pickle.dumps(list(pairs))))
    assert batch["num_skipped"] == 4 and len(batch["pixel_values"]) == 6
    for row in (0, 1):
        assert (
            f"skipped an image: {tmp_path}/a/0.parquet, row {row}: {tmp_path}/a/0.parquet, row group 0" in caplog.text
        )
    assert f"skipped an image: {tmp_path}/b/0.tar:0001.png: [Errno 2]" in caplog.text
    assert pairs.caption(6) is None


def test_captions_that_cannot_be_read_are_found_to_be_so_while_training(tmp_path, processor, monkeypatch, caplog):
    monkeypatch.setenv("VLV_DATA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stored, "MIN_SECONDS", 0)
    rows = [{"text": f"caption {n}" * 9, "image": encoded(n)} for n in range(4)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2)
    start = parquet.read_metadata(tmp_path / "a.parquet").row_group(0).column(0).dictionary_page_offset
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[start : start + 40] = b"\xff" * 40
    (tmp_path / "a.parquet").write_bytes(data)
    pairs = load_pairs(str(tmp_path / "a.parquet"))
    batch = Stage2Collator(processor, 12)([pairs[n] for n in range(4)])
    assert batch["num_skipped"] == 2 and "row group 0 cannot be read" in caplog.text
    assert not list((tmp_path / "cache").glob("*.npz"))  # the next run may be able to read them


def test_urls_in_parquet_are_refused_behind_files_and_rows_without_images(tmp_path):
    for name, images in (("0", []), ("1", [None, "https://x/0.png"]), ("2", ["0.png"])):
        parquet.write_table(pa.table({"image": pa.array(images, pa.string())}), tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match=r"1\.parquet, row 1: https://x/0\.png is a URL; download"):
        load_images(str(tmp_path))
    assert len(load_images(str(tmp_path / "2.parquet"))) == 1


def test_validation_samples_are_not_downloaded(image_processor, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(encoded(1))

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/0.png"
        assert image_processor.load(url).size == (8, 8)
        items = readable_items([{"image": url}, {"image": encoded(2)}], 2, image_processor)
        server.shutdown()
    assert len(items) == 1


def test_images_of_a_stream_may_lie_in_an_archive_or_beside_their_table(tmp_path, image_processor):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("0.png", encoded(7))
    parquet.write_table(pa.table({"image": ["0.png"]}), tmp_path / "a.parquet")
    (tmp_path / "zip").mkdir()
    (tmp_path / "images.zip").rename(tmp_path / "zip" / "images.zip")
    item = next(iter(load_images(str(tmp_path / "zip"), streaming=True)))
    assert image_processor.load(item["image"]).getpixel((0, 0)) == (7, 0, 0)
    (tmp_path / "zip" / "images.zip").rename(tmp_path / "images.bin")
    (tmp_path / "0.png").write_bytes(encoded(8))
    item = next(iter(load_images(str(tmp_path), streaming=True)))
    assert item["image"] == f"{tmp_path}/0.png"


def test_a_data_set_of_the_hub_names_no_image_outside_of_it(tmp_path, image_processor, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "root").mkdir()
    for name in ("private.png", "root/own.png"):
        (tmp_path / name).write_bytes(encoded(5))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("0.png", encoded(5))
    outside = [
        *("private.png", "../private.png", f"{tmp_path}/private.png", f"{tmp_path}/root/../private.png"),
        *(f"file://{tmp_path}/private.png", f"zip://0.png::{tmp_path}/a.zip", "hf://datasets/other/name@1/0.png"),
        *(f"file://{tmp_path}/private.png::hf://datasets/org/name@1/a", "hf://datasets/org/name@1/../../x/0.png"),
        "hf://datasets/org/name@1/0.png",  # of the data set itself, but there is no connection
    ]
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    inside = ["own.png", f"{tmp_path}/root/own.png", base64.b64encode(buffer.getvalue()).decode()]
    assert inside[-1].startswith("/9j/")  # as an absolute path does
    for image in (outside + inside, [{"path": path, "bytes": None} for path in outside + inside]):
        table = datasets.Dataset.from_dict({"image": image})
        items = list(ColumnDataset(table, "image", None, tmp_path / "root", repository="org/name"))
        refused = [getattr(item["image"], "reason", "") for item in items]
        assert ["is not in the data set org/name" in reason for reason in refused] == [True] * 9 + [False] * 4
        batch = Stage1Collator(image_processor, 8)(items)
        assert batch["num_skipped"] == len(outside) and len(batch["pixel_values"]) == 3
        source = StreamSource(table.to_iterable_dataset(), "org/name", "image", None, repository="org/name")
        items = [item for item, _ in zip(StreamingDataset([source]), table, strict=False)]
        assert Stage1Collator(image_processor, 8)([*items, {"image": encoded(1)}])["num_skipped"] == len(outside) + 2
    assert "private.png is not in the data set org/name" in caplog.text
    assert "hf://datasets/org/name@1/0.png: it cannot be read: Cannot reach" in caplog.text
    own = ColumnDataset(table, "image", None)  # a table of one's own may name any file
    assert own[2]["image"] == f"{tmp_path}/private.png"


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("list.jsonl", {}, r"list\.jsonl cannot be read with streaming"),
        ("*.tar", {}, r"\*\.tar cannot be read with streaming"),
        ("li*", {}, r"li\* cannot be read with streaming"),
        ("notes.docx", {}, r"notes\.docx cannot be read with streaming"),
        ("0.parquet", {}, r"0\.parquet cannot be read with streaming"),
        ("org/name", {"image_root": "x"}, "image_root is not possible with streaming"),
        ("org/name", {"on_bad_caption": "error"}, "on_bad_caption 'error' is not possible with streaming"),
    ],
)
def test_what_streaming_cannot_do_is_refused_by_name(tmp_path, monkeypatch, name, options, words):
    monkeypatch.chdir(tmp_path)
    Path("list.jsonl").write_text('{"image": "0.png", "caption": "a dog"}')
    Path("notes.docx").write_text("")
    with pytest.raises(ValueError, match=words):
        load_pairs(name, streaming=True, **options)
