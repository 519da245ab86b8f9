"""Inputs are found one by one: in folders, globs, lists, URLs, shards and data sets."""

import base64
import gc
import io
import json
import sys
import tarfile
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow
import pytest
from datasets import Dataset, DatasetDict
from datasets import Image as ImageFeature
from PIL import Image
from pyarrow import parquet

from vlv.captioning import sources, tables
from vlv.captioning.batches import read_batches
from vlv.captioning.dataset_rows import DatasetArguments
from vlv.captioning.output import Summary
from vlv.captioning.resume import ResumableResults
from vlv.captioning.sources import Inputs
from vlv.errors import UserError
from vlv.train.data import ParquetSource, load_pairs


@pytest.fixture(scope="module")
def encoded() -> list[bytes]:
    """Three small PNG files of different colours."""
    files = []
    for color in ("red", "green", "blue"):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), color).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files


@pytest.fixture
def folder(tmp_path, encoded) -> Path:
    folder = tmp_path / "photos"
    for name, data in zip(("a.png", "sub/b.png", "sub/deep/c.png"), encoded, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "notes.txt").write_text("a text")
    (folder / ".hidden.png").write_bytes(encoded[0])
    return folder


def names(*paths, **options) -> list[str]:
    return [item.name for item in Inputs([str(path) for path in paths], **options)]


def pixels(inputs, image_processor) -> list[tuple[int, int, int]]:
    """The colour of the first pixel of each input, as a run reads it."""
    summary = Summary(None)
    found = [image_processor.load(item.open().image).getpixel((0, 0)) for item in inputs]
    batches = list(read_batches(inputs, image_processor, 8, summary, identify=True))
    assert not summary.failed and sum(len(batch.inputs) for batch in batches) == len(found)
    assert all(item.identity["blake2b"] and item.content is None for batch in batches for item in batch.inputs)
    return found


COLORS = [(255, 0, 0), (0, 128, 0), (0, 0, 255)]


def give_stdin(monkeypatch, *lines) -> None:
    data = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_a_folder_is_searched_while_it_is_captioned(folder, encoded, monkeypatch, capsys):
    monkeypatch.setattr(sources, "LOOKAHEAD", 1)
    inputs = Inputs([str(folder)])
    assert len(inputs.first) == 2 and inputs.total is None and inputs.count() == 3
    late = folder / "sub" / "deep" / "z.png"
    late.write_bytes(encoded[0])
    assert not capsys.readouterr().err
    assert [item.name for item in inputs] == ["a.png", "sub/b.png", "sub/deep/c.png", "sub/deep/z.png"]
    assert capsys.readouterr().err == "not images, left out: 1 .txt\n"


def test_a_small_folder_is_counted_at_once(folder, capsys):
    assert Inputs([str(folder)], quiet_suffixes=[".txt"]).total == 3
    assert not capsys.readouterr().err


def test_names_are_relative_until_they_clash_and_as_given_where_many_are(folder, encoded, monkeypatch):
    (folder / "sub" / "a.png").write_bytes(encoded[1])
    both = [folder / "sub", folder]
    clashing = [f"{folder}/sub/a.png", "b.png", "deep/c.png", f"{folder}/a.png"]
    assert names(*both) == clashing
    monkeypatch.setattr(sources, "LISTED", 2)
    found = names(*both)
    assert found == [f"{folder}/sub/a.png", f"{folder}/sub/b.png", f"{folder}/sub/deep/c.png", f"{folder}/a.png"]


def test_a_glob_names_images_from_the_folder_that_it_starts_in(folder, encoded):
    assert sorted(names(folder / "**/*.png")) == ["a.png", "sub/b.png", "sub/deep/c.png"]
    assert names(folder / "su?/*") == ["sub/b.png"]
    (folder / "[x].png").write_bytes(encoded[0])
    assert names(folder / "[x].png") == ["[x].png"]  # a file of that name
    with pytest.raises(UserError, match=r"no images in .*\*\.gif"):
        names(folder / "*.gif")
    with pytest.raises(UserError, match=r"no images in .*\*\.txt; it holds 1 \.txt"):
        names(folder / "*.txt")


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("**", ["a.png", "sub/b.png", "sub/deep/c.png"]),
        ("**/deep/**/*.png", ["sub/deep/c.png"]),
        ("su[ab]/**/?.png", ["sub/b.png", "sub/deep/c.png", "sub/loop/a.png"]),
        ("**/*/c.*", ["sub/deep/c.png"]),
    ],
)
def test_a_glob_goes_through_folders_once_and_in_order(folder, pattern, found):
    for name in ("loop", "sub/loop"):
        (folder / name).symlink_to(folder)
    (folder / "sub" / ".cache").mkdir()
    (folder / "sub" / ".cache" / "c.png").write_bytes((folder / "a.png").read_bytes())
    assert names(folder / pattern) == found


def test_a_glob_names_what_it_leaves_out(folder_of_nobody, encoded, capsys):
    for name in ("locked", "open"):
        (folder_of_nobody / name).mkdir()
        (folder_of_nobody / name / "a.png").write_bytes(encoded[0])
    (folder_of_nobody / "locked").chmod(0)
    found = {item.name: item.problem for item in Inputs([str(folder_of_nobody / "*" / "*.png")])}
    assert found == {"open/a.png": None, "locked": "the folder cannot be listed: Permission denied"}
    (folder_of_nobody / "b.png").write_bytes(encoded[0])
    assert names(folder_of_nobody / "*") == ["b.png"]
    assert capsys.readouterr().err == "not images, left out: 2 folder\n"


def test_a_glob_names_folders_that_cannot_be_listed_and_shards(folder_of_nobody, encoded):
    (folder_of_nobody / "locked").mkdir(mode=0)
    write_tar(folder_of_nobody / "0.tar", {"1.png": encoded[0]})
    found = {item.name: item.problem for item in Inputs([str(folder_of_nobody / "**" / "*.tar")])}
    assert found == {"0.tar/1.png": None, "locked": "the folder cannot be listed: Permission denied"}


def test_a_list_on_standard_input_names_files_folders_and_what_is_missing(folder, monkeypatch):
    give_stdin(monkeypatch, folder / "a.png", "", folder / "gone.png", folder / "sub", folder / "a.png")
    inputs = list(Inputs(["-"]))
    expected = [folder / "a.png", folder / "gone.png", folder / "sub/b.png", folder / "sub/deep/c.png"]
    assert [item.name for item in inputs] == [str(path) for path in expected]
    assert inputs[1].problem == f"{folder / 'gone.png'} does not exist"
    monkeypatch.chdir(folder)
    give_stdin(monkeypatch, "\ufeff./a.png\r", "  ", "./sub/", "sub//b.png", "./gone.png\r")
    inputs = list(Inputs(["-"]))
    assert [item.name for item in inputs] == ["./a.png", "./sub/b.png", "./sub/deep/c.png", "./gone.png"]
    assert [item.problem for item in inputs] == [None, None, None, "./gone.png does not exist"]
    give_stdin(monkeypatch, " ", "\r")
    with pytest.raises(UserError, match="no images in -"):
        Inputs(["-"])


def test_a_list_is_read_line_by_line(folder, monkeypatch):
    class Endless:
        def __init__(self):
            self.read = 0

        def __iter__(self):
            while True:
                self.read += 1
                yield f"{folder}/{self.read}.png\n".encode()

    lines = Endless()
    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": lines}))
    inputs = iter(Inputs(["-"]))
    assert next(inputs).name == f"{folder}/1.png" and lines.read == 2


def write_tar(path, members) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_images_in_tar_files_are_called_by_file_and_member(tmp_path, encoded, image_processor):
    tar = write_tar(tmp_path / "0.tar", {"x/0.png": encoded[0], "x/0.txt": b"red", "1.png": encoded[1]})
    write_tar(tmp_path / "1.tar", {"2.png": encoded[2]})
    inputs = list(Inputs([str(tmp_path / "*.tar")]))
    inputs.sort(key=lambda item: item.name)
    assert [item.name for item in inputs] == ["0.tar/1.png", "0.tar/x/0.png", "1.tar/2.png"]
    assert pixels(inputs, image_processor) == [COLORS[1], COLORS[0], COLORS[2]]
    assert inputs[1].source == f"{tar}#x/0.png"


def test_each_image_of_a_tar_file_is_an_input_of_its_own(tmp_path, encoded, image_processor, capsys):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in zip(
            ("a.2024.jpg", "b.png", "b.jpg", "b.png", "b.txt"), [*encoded, encoded[0], b""], strict=True
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    inputs = list(Inputs([str(path)]))
    assert [item.member for item in inputs] == ["a.2024.jpg", "b.png", "b.jpg", "b.png#2"]
    assert pixels(inputs, image_processor) == [*COLORS, COLORS[0]]
    assert capsys.readouterr().err == "not images, left out: 1 .txt\n"
    with pytest.raises(UserError, match="no images in"):
        list(Inputs([str(tmp_path / "*.txt")]))


def test_a_tar_file_that_changes_after_it_was_listed_is_named(tmp_path, encoded):
    inputs = list(Inputs([str(write_tar(tmp_path / "0.tar", {"0.png": encoded[0], "1.png": encoded[1]}))]))
    write_tar(tmp_path / "0.tar", {"0.png": encoded[2] * 20, "1.png": encoded[1]})
    with pytest.raises(ValueError, match="changed after its images were listed"):
        inputs[1].open()


def test_of_many_shards_few_are_open(tmp_path, encoded, image_processor):
    for number in range(6):
        parquet.write_table(pyarrow.table({"image": [encoded[number % 3]]}), tmp_path / f"{number}.parquet")
    tables.open_table.cache_clear()
    gc.collect()
    before = sum(isinstance(each, ParquetSource) for each in gc.get_objects())
    inputs = Inputs([str(tmp_path / "*.parquet")])
    assert pixels(list(inputs), image_processor) == 2 * COLORS
    assert sum(isinstance(each, ParquetSource) for each in gc.get_objects()) - before == tables.OPEN_TABLES


def test_rows_that_are_not_images_fail_by_themselves(tmp_path, image_processor):
    parquet.write_table(pyarrow.table({"number": [5, 6]}), tmp_path / "p.parquet")
    summary = Summary(None)
    rows = Inputs([str(tmp_path / "p.parquet")], column="number")
    assert list(read_batches(rows, image_processor, 8, summary, identify=True)) == []
    assert summary.failed["p.parquet/1"] == "the row has int 6 in place of an image"


def test_a_damaged_shard_is_one_bad_input(tmp_path, encoded):
    (tmp_path / "0.tar").write_bytes(b"no tar at all" * 100)
    (tmp_path / "1.parquet").write_bytes(b"PAR1")
    parquet.write_table(pyarrow.table({"words": ["x"]}), tmp_path / "2.parquet")
    write_tar(tmp_path / "3.tar", {"2.png": encoded[2]})
    found = {item.name: item.problem for item in Inputs([str(p) for p in sorted(tmp_path.iterdir())])}
    assert found["3.tar/2.png"] is None and len(found) == 4
    assert "cannot be read as a tar file" in found["0.tar"] and "cannot be read as parquet" in found["1.parquet"]
    assert "has the columns ['words'], but no 'image'" in found["2.parquet"]


def test_images_in_parquet_files_are_called_by_file_and_row(tmp_path, encoded, image_processor):
    table = pyarrow.table({"picture": encoded, "text": ["r", "g", "b"]})
    parquet.write_table(table, tmp_path / "p.parquet", row_group_size=2)
    inputs = Inputs([str(tmp_path / "p.parquet")], column="picture")
    assert inputs.total == 3 and [item.name for item in inputs] == [f"p.parquet/{row}" for row in range(3)]
    assert pixels(list(inputs), image_processor) == COLORS


def test_the_images_of_a_list_are_called_by_their_path_and_of_several_by_list_and_path(
    folder, encoded, image_processor
):
    lines = [{"image": "a.png"}, {"image": "sub/b.png"}, {"image": "a.png"}]
    (folder / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    inputs = list(Inputs([str(folder / "list.jsonl")]))
    assert [item.name for item in inputs] == ["a.png", "sub/b.png", "a.png#2"]
    two = Inputs([str(folder / "list.jsonl"), str(folder / "sub")])
    assert [item.name for item in two][1:3] == ["list.jsonl/sub/b.png", "list.jsonl/a.png#2"]
    assert pixels(inputs, image_processor) == [COLORS[0], COLORS[1], COLORS[0]]
    elsewhere = (folder / "list.jsonl").rename(folder.parent / "list.jsonl")
    moved = list(Inputs([str(elsewhere)], image_root=f"{folder}/"))
    assert [item.name for item in moved] == [item.name for item in inputs]
    assert pixels(moved, image_processor) == [COLORS[0], COLORS[1], COLORS[0]]
    inputs = moved
    known = inputs[0].identify()
    (folder / "a.png").write_bytes(encoded[2])
    assert inputs[0].identify()["blake2b"] != known["blake2b"]


@pytest.mark.parametrize("as_dataset", [False, True])
def test_a_missing_image_of_a_list_fails_alone(folder, image_processor, as_dataset):
    lines = [{"image": "no.png"}, {"image": "a.png"}, {"image": "sub"}]
    (folder / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    file = str(folder / "list.jsonl")
    inputs = Inputs([], DatasetArguments(file)) if as_dataset else Inputs([file])
    summary = Summary(None)
    (batch,) = read_batches(inputs, image_processor, 8, summary, identify=True)
    expected = [f"train/{row}" if as_dataset else line["image"] for row, line in enumerate(lines)]
    first, good, third = expected
    assert batch.names == [good]
    assert summary.failed == {first: f"{folder}/no.png does not exist", third: f"{folder}/sub is not a file"}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "coco.json"])
def test_what_is_wrong_in_a_line_of_a_list_fails_alone(folder, image_processor, suffix):
    content = {
        "jsonl": b'{"file": 1}\n{"image": "a.png"}\n{broken\n[1]\n{"image": 5}\n{"file": 2}\n{"image": "\xff.png"}\n'
        + b"9" * 5000
        + b"\n"
        + b"[" * 100_000,
        "json": b'[{"image": null}, {"image": "a.png"}, 7, {}]',
        "csv": b'image,caption\na.png,"a, b"\n,empty\nb.png,too,many\n\xff.png,a\n',
        "coco.json": b'{"images": [5, {"file_name": "a.png"}, {}], "annotations": null}',
    }[suffix]
    file = folder / f"list.{suffix}"
    file.write_bytes(content)
    summary = Summary(None)
    (batch,) = read_batches(Inputs([str(file)]), image_processor, 8, summary)
    assert batch.names == ["a.png"]
    expected = {
        "jsonl": {
            "line 1": ", line 1: expected columns such as ",
            "line 3": ", line 3 is not valid JSON: ",
            "line 4": ", line 4: expected an object, got a list",
            "line 5": ", line 5: the image is 5, expected a path",
            "line 6": ", line 6: expected columns such as ",
            "line 7": ", line 7 is not UTF-8",
            "line 8": ", line 8 is not valid JSON: ",
            "line 9": ", line 9 is not valid JSON: ",
        },
        "json": {
            "entry 0": ", entry 0: the image is None, expected a path",
            "entry 2": ", entry 2: expected an object, got a int",
            "entry 3": ", entry 3: expected columns such as ",
        },
        "csv": {
            "line 3": ", line 3: the image is '', expected a path",
            "line 4": ", line 4: expected 2 columns as in the first line",
            "line 5": ", line 5 is not UTF-8",
        },
        "coco.json": {
            "image 0": ", image 0: expected an object, got a int",
            "image 2": ", image 2: the image is None, expected a path",
        },
    }[suffix]
    assert list(summary.failed) == list(expected)
    for reason, words in zip(summary.failed.values(), expected.values(), strict=True):
        assert f"{file}{words}" in reason


def test_rows_that_hold_a_path_or_base64_are_read(tmp_path, encoded, image_processor):
    (tmp_path / "a.png").write_bytes(encoded[0])
    rows = ["a.png", base64.b64encode(encoded[1]).decode()]
    parquet.write_table(pyarrow.table({"image": rows}), tmp_path / "p.parquet")
    assert pixels(list(Inputs([str(tmp_path / "p.parquet")])), image_processor) == COLORS[:2]


def test_the_length_of_a_shard_is_known_beyond_the_first_rows(tmp_path, encoded, monkeypatch):
    monkeypatch.setattr(sources, "LOOKAHEAD", 1)
    parquet.write_table(pyarrow.table({"image": encoded}), tmp_path / "p.parquet")
    inputs = Inputs([str(tmp_path / "p.parquet")])
    assert inputs.total == 3 and len(list(inputs)) == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_of_the_hugging_face_libraries_is_read(tmp_path, encoded, image_processor, streaming):
    data = Dataset.from_dict({"image": [{"bytes": image, "path": None} for image in encoded]})
    data = data.cast_column("image", ImageFeature())
    if streaming:
        data.to_parquet(tmp_path / "train.parquet")
    else:
        DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path)
    found = Inputs([], DatasetArguments(str(tmp_path), streaming=streaming))
    assert found.total == (None if streaming else 3)
    inputs = list(found)
    assert [item.name for item in inputs] == ["train/0", "train/1", "train/2"]
    assert pixels(inputs, image_processor) == COLORS
    if not streaming:
        assert [item.name for item in Inputs([], DatasetArguments(str(tmp_path), "test"))] == ["test/0"]
        with pytest.raises(UserError, match="it has no split 'valid'; it has test, train"):
            Inputs([], DatasetArguments(str(tmp_path), "valid"))


def test_a_split_is_that_of_the_data_set_or_refused(tmp_path, encoded):
    for split, images in (("train", encoded[:2]), ("test", encoded[2:])):
        parquet.write_table(pyarrow.table({"image": images}), tmp_path / f"{split}-0.parquet")

    def read(split):
        return [(item.name, item.open().content) for item in Inputs([], DatasetArguments(str(tmp_path), split))]

    assert read("test") == [("test/0", encoded[2])]
    assert read(None) == [(f"train/{row}", encoded[place]) for row, place in enumerate((2, 0, 1))]  # all files
    with pytest.raises(UserError, match=r'Unknown split "valid"'):
        read("valid")
    with pytest.raises(UserError, match="it has no splits; leave out --split test"):
        Inputs([], DatasetArguments(str(tmp_path / "test-0.parquet"), "test"))


def test_results_of_a_data_set_that_has_changed_are_made_again(tmp_path, encoded):
    folder, output = tmp_path / "data", tmp_path / "c.jsonl"
    (folder / "sub").mkdir(parents=True)

    def write(*images):
        parquet.write_table(pyarrow.table({"image": list(images)}), folder / "sub" / "0.parquet")
        return list(Inputs([], DatasetArguments(str(folder))))

    def resume(inputs):
        results = ResumableResults(output, ("m", "1"), {})
        left = [item.name for item in results.resume(inputs)]
        results.release()
        return left

    with ResumableResults(output, ("m", "1"), {}) as results:
        inputs = write(encoded[0], encoded[1])
        results.add([replace(item, identity=item.identify()) for item in inputs], ["A", "B"])
    assert resume(list(Inputs([], DatasetArguments(str(folder))))) == []
    assert resume(write(encoded[0], encoded[2])) == ["train/1"]


def test_a_row_of_a_stream_that_cannot_be_read_ends_the_run_with_its_number(tmp_path, encoded):
    table = pyarrow.table({"image": [{"bytes": image, "path": None} for image in encoded]})
    parquet.write_table(table, tmp_path / "0.parquet")
    (tmp_path / "1.parquet").write_bytes(b"PAR1 no table at all PAR1")
    inputs = iter(Inputs([], DatasetArguments(str(tmp_path), streaming=True)))
    assert [next(inputs).name for _ in encoded] == ["train/0", "train/1", "train/2"]
    with pytest.raises(UserError, match=rf"--dataset {tmp_path}: train/3 cannot be read: .*; the captions before it"):
        next(inputs)


def test_a_data_set_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--dataset \./nowhere: "):
        Inputs([], DatasetArguments("./nowhere"))
    with pytest.raises(UserError, match=rf"--dataset {tmp_path}: "):
        Inputs([], DatasetArguments(str(tmp_path), streaming=True))


def test_members_keep_their_results_as_long_as_they_are_the_same(tmp_path, encoded):
    tar, output = tmp_path / "0.tar", tmp_path / "c.jsonl"
    write_tar(tar, {"0.png": encoded[0], "1.png": encoded[1]})
    inputs = list(Inputs([str(tar)]))
    results = ResumableResults(output, ("m", "1"), {})
    results.add([replace(item, identity=item.identify()) for item in inputs], ["A", "B"])
    results.__exit__(None)
    write_tar(tar, {"0.png": encoded[0], "1.png": encoded[2], "2.png": encoded[1]})
    results = ResumableResults(output, ("m", "1"), {})
    left = results.resume(list(Inputs([str(tar)])))
    assert [item.name for item in left] == ["0.tar/1.png", "0.tar/2.png"]
    with results:
        pass
    assert [json.loads(line) for line in output.read_text().splitlines()] == [{"name": "0.tar/0.png", "caption": "A"}]


@contextmanager
def serving(answers):
    """A web server: `answers` has what it does for each path."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            answers[self.path](self)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_urls_are_downloaded_within_limits(encoded, image_processor, monkeypatch):
    ended = threading.Event()

    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(encoded[0])))
        handler.end_headers()
        handler.wfile.write(encoded[0])

    def hang(handler):
        ended.wait(20)

    def refuse(handler):
        handler.send_error(404)

    def flood(handler):
        handler.send_response(200)
        handler.end_headers()
        try:
            while not ended.is_set():
                handler.wfile.write(bytes(10_000))
        except OSError:
            pass

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("vlv.captioning.downloads.SIZE_LIMIT", 50_000)
    with serving({"/a.png": answer, "/slow": hang, "/gone": refuse, "/flood": flood}) as address:
        urls = [f"{address}/{name}" for name in ("a.png", "gone", "flood")]
        inputs = list(Inputs([*urls, "http://[bad"]))
        inputs += Inputs([f"{address}/slow"], url_timeout=0.2)
        assert [item.name for item in inputs] == [*urls, "http://[bad", f"{address}/slow"]
        assert pixels(inputs[:1], image_processor) == COLORS[:1]
        summary = Summary(None)
        assert list(read_batches(inputs[1:], image_processor, 8, summary)) == []
        ended.set()
    gone, flooded, bad, slow = summary.failed.values()
    assert "404" in gone and "more than 50,000 bytes" in flooded
    assert "it cannot be downloaded: " in bad and "it cannot be downloaded: timed out" in slow


def test_the_urls_of_a_list_are_downloaded(folder, encoded, image_processor, monkeypatch):
    def answer(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(encoded[2])

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with serving({"/c.png": answer}) as address:
        (folder / "list.jsonl").write_text(f'{{"image": "a.png"}}\n{{"image": "{address}/c.png"}}\n')
        inputs = list(Inputs([str(folder / "list.jsonl")]))
        assert [item.name for item in inputs] == ["a.png", f"{address}/c.png"]
        assert pixels(inputs, image_processor) == [COLORS[0], COLORS[2]]


@pytest.mark.parametrize("as_dataset", [False, True])
def test_a_url_of_a_list_that_has_its_result_is_not_downloaded_again(tmp_path, as_dataset):
    url = "http://127.0.0.1:9/0.png"  # where no server is
    (tmp_path / "list.jsonl").write_text(json.dumps({"image": url}))
    file, output = str(tmp_path / "list.jsonl"), tmp_path / "c.jsonl"
    (item,) = Inputs([], DatasetArguments(file)) if as_dataset else Inputs([file])
    with ResumableResults(output, ("m", "1"), {}) as results:
        results.add([replace(item, identity=replace(item, content=b"image").identify())], ["A"])
    results = ResumableResults(output, ("m", "1"), {})
    read = []
    assert results.resume([replace(item, read=lambda: read.append(1))]) == [] and not read
    results.release()


def test_absolute_paths_in_a_list_of_the_working_folder_stay_absolute(folder, monkeypatch):
    (folder / "list.csv").write_text(f"image\n{folder}/sub/b.png\na.png\n")
    monkeypatch.chdir(folder)
    assert [item.name for item in Inputs(["list.csv"])] == [f"{folder}/sub/b.png", "a.png"]


def test_captions_of_a_list_are_pairs_also_where_an_earlier_version_named_them_by_the_list(folder):
    (folder / "list.csv").write_text("image\na.png\nsub/b.png\n")
    output, inputs = folder / "c.json", list(Inputs([str(folder / "list.csv")]))
    with ResumableResults(output, ("m", "1"), {}) as results:
        results.add([replace(inputs[0], name="list.csv/a.png", identity=inputs[0].identify())], ["A"])
    results = ResumableResults(output, ("m", "1"), {})
    (left,) = results.resume(inputs)
    with results:
        results.add([replace(left, identity=left.identify())], ["B"])
    assert json.loads(output.read_text()) == {"a.png": "A", "sub/b.png": "B"}
    pairs = load_pairs(str(output))
    assert sorted(pairs[row]["image"] for row in range(2)) == [f"{folder}/a.png", f"{folder}/sub/b.png"]


def test_without_a_network_a_url_is_one_bad_input(image_processor, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    summary = Summary(None)
    assert list(read_batches(Inputs(["https://example.org/a.png"]), image_processor, 8, summary)) == []
    assert "offline mode is enabled" in summary.failed["https://example.org/a.png"]


def test_a_file_that_changes_while_it_is_read_is_named(folder, image_processor, encoded):
    class Growing(type(image_processor)):
        def load(self, image):
            loaded = super().load(image)
            Path(image).write_bytes(encoded[2] + b"more")
            return loaded

    summary, settings = Summary(None), image_processor.to_dict()
    rows = list(read_batches(Inputs([str(folder / "a.png")]), Growing(**settings), 8, summary, identify=True))
    assert rows == [] and "the file changed while it was read" in summary.failed["a.png"]
