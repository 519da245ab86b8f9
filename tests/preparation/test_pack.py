"""`vlv data pack`: shards that the trainers read, complete or absent."""

import fcntl
import json
import os
import tarfile

import datasets
import pytest
from PIL import Image

from vlv.cli.main import main
from vlv.preparation.pack import pack
from vlv.preparation.records import Records
from vlv.processing_vlv import to_rgb
from vlv.train import load_images, load_pairs

from .inputs import write_pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten pictures, and one file that is none."""
    folder = write_pictures(tmp_path_factory.mktemp("data") / "pictures", 10)
    (folder / "03.txt").write_text("one caption\nanother caption\n")
    (folder / "bad.jpg").write_text("no picture")
    (folder / "bad.txt").write_text("of nothing")
    return folder


def test_images_that_failed_are_in_the_exit_code_of_a_run_with_nothing_to_do(folder, tmp_path, capsys):
    command = ["data", "pack", str(folder), "--output", str(tmp_path / "out")]
    assert [main(command), main(command)] == [1, 1] and "nothing to do" in capsys.readouterr().err


def contents(dataset) -> list[tuple[bytes, str]]:
    return [(to_rgb(item["image"]).tobytes(), item["caption"]) for item in dataset]


@pytest.mark.parametrize("format", ["webdataset", "parquet"])
def test_the_trainers_read_from_shards_what_they_read_from_the_folder(folder, tmp_path, format):
    counts = pack(Records(str(folder), pairs=True), tmp_path / "out", format=format, shard_images=4)
    assert (counts["images"], counts["failed"], counts["shards"]) == (10, 1, 3)
    assert json.loads((tmp_path / "out" / "failed.json").read_text()).keys() == {"bad.jpg"}
    expected = [
        (Image.open(folder / f"{number:02d}.png").tobytes(), text)
        for number in range(10)
        for text in (["one caption", "another caption"] if number == 3 else [f"picture number {number}"])
    ]
    assert contents(load_pairs(str(tmp_path / "out"), caption_lines="all")) == expected
    assert len(load_images(str(tmp_path / "out"))) == 10


def test_parquet_shards_are_images_to_datasets(folder, tmp_path):
    pack(Records(str(folder)), tmp_path / "out", format="parquet", shard_images=6)
    files = [str(path) for path in sorted((tmp_path / "out").glob("*.parquet"))]
    table = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert table[9]["image"].tobytes() == Image.open(folder / "09.png").tobytes() and table[9]["name"] == "09.png"


def test_a_shard_ends_before_it_has_more_bytes_than_asked_for(folder, tmp_path):
    sizes = [(folder / f"{number:02d}.png").stat().st_size for number in range(10)]
    pack(Records(str(folder)), tmp_path / "out", shard_images=None, shard_bytes=max(sizes) * 2)
    shards, packed = sorted((tmp_path / "out").glob("*.tar")), []
    for shard in shards:
        with tarfile.open(shard) as content:
            own = [member.size for member in content if member.name.endswith(".png")]
        assert own and sum(own) <= max(sizes) * 2
        packed += own
    assert packed == sizes and 5 <= len(shards) < 10


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_what_captioning_writes_is_packed_with_its_images(folder, tmp_path, suffix):
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))[:2]
    captions = dict(zip(names, ("one", ["two", "zwei"]), strict=True)) | {"empty.png": ""}
    file = tmp_path / f"captions.{suffix}"
    lines = [json.dumps({"name": name, "caption": caption}) for name, caption in captions.items()]
    file.write_text(json.dumps(captions, indent=2) if suffix == "json" else "\n".join(lines))
    assert main(["data", "pack", str(folder), "--captions", str(file), "--output", str(tmp_path / "out")]) == 0
    pairs = load_pairs(str(tmp_path / "out"), caption_lines="all")
    assert {item["caption"] for item in pairs} == {"one", "two", "zwei"}
    file.write_text(json.dumps({"other.png": "of another source"}))
    command = ["data", "pack", str(folder), "--captions", str(file), "--output", str(tmp_path / "again")]
    assert main(command) == 2


def test_the_command_is_idempotent_and_refuses_a_changed_source(tmp_path, capsys):
    pictures, out = write_pictures(tmp_path / "in", 4), tmp_path / "out"
    command = ["data", "pack", str(pictures), "--pairs", "--output", str(out)]
    assert main(command) == 0
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    assert main(command) == 0 and "nothing to do" in capsys.readouterr().err
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()} == before
    assert main([*command[:2], f"{pictures}/", *command[3:]]) == 0 and "nothing to do" in capsys.readouterr().err
    (out / "shard-00000.tar").unlink()
    assert main(command) == 0
    assert (out / "shard-00000.tar").read_bytes() == before[out / "shard-00000.tar"][0]
    os.utime(pictures / "00.png", (0, 0))
    assert main(command) == 2 and "the images or captions of the source have changed" in capsys.readouterr().err
    write_pictures(pictures, 5)
    assert main(command) == 2 and "records was 4, not 5" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0 and len(load_images(str(out))) == 5


def test_a_folder_with_other_files_and_one_that_another_process_writes_are_refused(tmp_path, capsys):
    pictures, out = write_pictures(tmp_path / "in", 2), tmp_path / "out"
    out.mkdir()
    (out / "own.txt").write_text("mine")
    assert main(["data", "pack", str(pictures), "--output", str(out), "--overwrite"]) == 2
    assert "no manifest says what made it" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["own.txt"]
    (tmp_path / "other" / ".progress").mkdir(parents=True)
    with open(tmp_path / "other" / ".progress" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["data", "pack", str(pictures), "--output", str(tmp_path / "other")]) == 2
    assert "another process is writing" in capsys.readouterr().err


def test_a_shard_has_the_size_of_the_upright_image_and_a_suffix_that_readers_know(tmp_path):
    (tmp_path / "in").mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "in" / "a.jpg", exif=turned)
    Image.new("RGB", (8, 8)).save(tmp_path / "in" / "b.sgi")
    assert pack(Records(str(tmp_path / "in")), tmp_path / "out")["images"] == 2
    with tarfile.open(tmp_path / "out" / "shard-00000.tar") as shard:
        facts = json.load(shard.extractfile("000000000.json"))
    assert (facts["width"], facts["height"]) == (20, 30) and len(load_images(str(tmp_path / "out"))) == 2


@pytest.mark.parametrize("place", ["", "packed"])
def test_an_output_in_the_source_is_refused(tmp_path, capsys, place):
    pictures = write_pictures(tmp_path / "in", 2)
    assert main(["data", "pack", str(pictures), "--output", str(pictures / place)]) == 2
    assert "which is the source" in capsys.readouterr().err
    assert {path.suffix for path in pictures.iterdir()} == {".png", ".txt"}


def test_a_source_without_readable_images_is_an_error_with_the_reason(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bad.png").write_text("no picture")
    assert main(["data", "pack", str(tmp_path / "in"), "--output", str(tmp_path / "out")]) == 2
    assert "none of the 1 images" in (said := capsys.readouterr().err) and "bad.png: " in said
    assert not list((tmp_path / "out").glob("*.tar"))
