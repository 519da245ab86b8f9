"""`vlv caption --shards`: each shard is complete or absent, and `--merge` has each image once."""

import argparse
import csv
import json
import os
import shutil
import signal
import tarfile
import time
from itertools import chain
from pathlib import Path

import pytest

from vlv.captioning.batches import read_rows
from vlv.captioning.captioner import Captioner, CaptionSettings
from vlv.captioning.division import divide, read_division
from vlv.captioning.formats import SUFFIXES
from vlv.captioning.output import Summary
from vlv.captioning.sharded import ShardCaptioner, ShardJob
from vlv.captioning.shards import ShardFolder
from vlv.captioning.texts import CaptionEditor
from vlv.cli.caption_shards import own_shards
from vlv.cli.main import main
from vlv.cli.parsers.shards import distribution
from vlv.errors import UserError

from .kill_captioning import kill_and_go_on, shards_in

RUN = {"model": "m", "fingerprint": "f", "settings": {"max_new_tokens": "4"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, images) -> Path:
    """Eleven images in two folders, and one that cannot be read."""
    folder = tmp_path_factory.mktemp("in")
    (folder / "sub").mkdir()
    for number in range(11):
        images[number % len(images)].rotate(number).save(folder / ("sub" if number % 2 else ".") / f"{number}.png")
    (folder / "sub" / "damaged.png").write_text("damaged")
    return folder


def caption(model, *arguments) -> int:
    words = ("--model", model, "--device", "cpu", "--max-new-tokens", 4, *arguments)
    return main(["caption", *map(str, words)])


def begin(folder: Path, paths, shards: int) -> ShardFolder:
    paths = [str(path) for path in paths]
    return ShardFolder.begin(folder, paths, {**RUN, "shards": shards, "inputs": paths})


def write_shard(shards: ShardFolder, index: int, rows=None) -> None:
    rows = [{"name": item.name, "caption": "a"} for item in shards.inputs(index)] if rows is None else rows
    with shards.claim(index) as writer:
        writer.add(rows)
        writer.finish({"counts": {"captioned": len(rows), "failed": 0}})


@pytest.fixture(scope="module")
def finished(tmp_path_factory, folder, model_folder) -> Path:
    """Three shards of the folder."""
    output = tmp_path_factory.mktemp("out") / "shards"
    assert caption(model_folder, folder, "--shards", 3, "--output-dir", output) == 1  # an image is damaged
    return output


def test_captions_that_repeat_themselves_are_named(folder, captioner, processor, tmp_path, capsys):
    shards = begin(tmp_path / "out", [folder / "0.png", folder / "2.png"], 1)
    job = ShardJob("unused", "float32", "cpu", CaptionSettings(max_new_tokens=4), CaptionEditor(loop_guard=True))
    ShardCaptioner(job, Repeating(captioner, processor, job.settings)).caption(shards, 0)
    note = "note: 2 captions repeat themselves over and over, cut after the first pass"
    assert note in capsys.readouterr().err
    assert json.loads(shards.manifest_path(0).read_text())["notes"] == [note]
    assert json.loads(shards.path(0).read_text().splitlines()[0])["caption"] == "a b"


class Repeating(Captioner):
    """Writes a caption that repeats itself."""

    def caption(self, batch):
        return [["a b " * 8] for _ in batch.inputs]


def set_launcher(monkeypatch, variables) -> None:
    """Sets the variables of a launcher, and no others."""
    for name in [name for name in os.environ if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def merge(folder: Path, output: Path, *arguments) -> int:
    return main(["caption", "--merge", str(folder), "--output", str(output), *arguments])


def test_merging_into_sidecars_says_that_images_have_no_caption(finished, tmp_path, capsys):
    options = ["--sidecar", "txt", "--sidecar-dir", str(tmp_path / "texts")]
    assert main(["caption", "--merge", str(finished), *options]) == 1
    said = capsys.readouterr().err
    assert "wrote 11, failed 0" in said
    assert "1 images have no caption (see the `error` lines of the shards)" in said


@pytest.mark.slow
def test_merged_shards_are_the_captions_of_one_run(finished, folder, model_folder, tmp_path, capsys):
    assert caption(model_folder, folder, "--output", tmp_path / "alone.json") == 1
    assert merge(finished, tmp_path / "merged.json") == 1
    assert "merged 11, failed 1" in capsys.readouterr().err
    assert json.loads((tmp_path / "merged.json").read_text()) == json.loads((tmp_path / "alone.json").read_text())
    lines = [len(data.splitlines()) for data in shards_in(finished).values()]
    assert sum(lines) == 12 and max(lines) < 12


def test_merged_rows_have_captions_or_errors(finished, tmp_path):
    from pyarrow import parquet

    assert merge(finished, tmp_path / "merged.jsonl") == 1 and merge(finished, tmp_path / "merged.parquet") == 1
    rows = [json.loads(line) for line in (tmp_path / "merged.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows if "error" in row] == ["sub/damaged.png"]
    table = parquet.read_table(tmp_path / "merged.parquet").to_pylist()
    assert table == [{"caption": None, "error": None, **row} for row in rows]
    assert merge(finished, tmp_path / "merged.csv") == 1
    with open(tmp_path / "merged.csv", newline="") as file:
        assert [*csv.DictReader(file)] == [{"caption": "", "error": "", **row} for row in rows]


def test_names_that_are_not_utf_8_are_merged_into_any_format(folder, tmp_path):
    from pyarrow import parquet

    (tmp_path / "in").mkdir()
    shutil.copy(folder / "0.png", os.fsencode(tmp_path / "in") + b"/a\xff.png")
    shards = begin(tmp_path / "out", [tmp_path / "in"], 1)
    write_shard(shards, 0)
    for suffix in SUFFIXES:
        assert merge(shards.folder, tmp_path / f"merged{suffix}") == 0
    assert parquet.read_table(tmp_path / "merged.parquet").to_pylist()[0]["name"] == "a\\udcff.png"
    assert b"a\xff.png" in (tmp_path / "merged.csv").read_bytes()


def test_merging_onto_a_full_disk_leaves_no_file(folder, tmp_path, small_disk, capsys):
    shards = begin(tmp_path / "out", [folder], 1)
    write_shard(shards, 0, [{"name": item.name, "caption": "a" * 500_000} for item in shards.inputs(0)])
    for suffix in (".json", ".csv"):
        assert merge(shards.folder, small_disk / f"merged{suffix}") == 2
        assert "No space left" in capsys.readouterr().err
        assert not list(small_disk.iterdir())


def test_a_manifest_says_how_a_shard_was_made(finished):
    manifests = [json.loads(path.read_text()) for path in sorted(finished.glob("shard-*.json"))]
    assert [manifest["shard"] for manifest in manifests] == [0, 1, 2]
    assert sum(manifest["counts"]["captioned"] for manifest in manifests) == 11
    assert sum(manifest["counts"]["failed"] for manifest in manifests) == 1
    assert manifests[0]["settings"]["max_new_tokens"] == "4" and manifests[0]["versions"]["torch"]
    assert (finished / manifests[0]["inputs"]).is_file()


@pytest.mark.slow
def test_shards_that_are_done_are_left_alone(finished, folder, model_folder, tmp_path, capsys):
    output = shutil.copytree(finished, tmp_path / "again")
    before = {path: path.stat().st_mtime_ns for path in output.glob("shard-*")}
    again = (folder, "--shards", 3, "--output-dir", output)
    assert caption(model_folder, *again) == 1  # an image of a shard that is done has failed
    (output / "shard-00001-of-00003.jsonl").unlink()
    caption(model_folder, folder, "--shards", 3, "--output-dir", output, "--num-workers", 1, "--static-cache")
    assert "2 of 3 shards are done" in capsys.readouterr().err
    assert shards_in(output) == shards_in(finished)
    after = {path: path.stat().st_mtime_ns for path in output.glob("shard-*")}
    assert [path.name for path in sorted(before) if after[path] != before[path]] == [
        "shard-00001-of-00003.json",
        "shard-00001-of-00003.jsonl",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": "g"}, r"shards of another model, m \(f\)"),
        ({"settings": {"max_new_tokens": "5"}}, "max_new_tokens 4, here 5"),
        ({"shards": 3}, "begun with shards 2, here 3"),
        ({"inputs": ["elsewhere"]}, "begun with inputs"),
    ],
)
def test_shards_of_another_run_are_refused(folder, tmp_path, changes, message):
    run = {**RUN, "shards": 2, "inputs": [str(folder)]}
    ShardFolder.begin(tmp_path / "out", [str(folder)], run)
    with pytest.raises(UserError, match=message):
        ShardFolder.begin(tmp_path / "out", [str(folder)], run | changes)


def test_a_folder_is_divided_by_names_alone(folder, tmp_path):
    """Each image is in one shard, whatever the place of the folder."""
    moved = shutil.copytree(folder, tmp_path / "moved")
    names = []
    for number, place in enumerate((folder, moved)):
        lists = tmp_path / f"lists-{number}"
        lists.mkdir()
        of_shards = divide([str(place)], 4, lists)["of_shards"]
        names.append([[item.name for item in read_division(lists, i, 4, of_shards[i])] for i in range(4)])
    assert names[0] == names[1]
    assert sorted(chain.from_iterable(names[0])) == sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*.png")
    )


@pytest.mark.slow
def test_a_tar_file_is_a_shard(folder, tmp_path, model_folder):
    files = sorted(folder.glob("*.png"))
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for path in files[number::2]:
                tar.add(path, arcname=path.name)
            tar.add(files[0], arcname="again.png")
    arguments = (tmp_path, "--shards", 2, "--output-dir", tmp_path / "out")
    assert caption(model_folder, *arguments) == 0
    for number in range(2):
        rows = (tmp_path / "out" / f"shard-0000{number}-of-00002.jsonl").read_text().splitlines()
        names = [f"{number}.tar/{path.name}" for path in files[number::2]] + [f"{number}.tar/again.png"]
        assert [json.loads(row)["name"] for row in rows] == names
    assert merge(tmp_path / "out", tmp_path / "merged.json") == 0
    same = [f"0.tar/{files[0].name}", "0.tar/again.png", "1.tar/again.png"]
    captions = json.loads((tmp_path / "merged.json").read_text())
    assert len({captions[name] for name in same}) == 1


def test_rows_of_parquet_and_list_files_are_inputs(folder, tmp_path):
    import pyarrow
    from pyarrow import parquet

    files = sorted(folder.glob("*.png"))
    images = [{"bytes": path.read_bytes(), "path": path.name} for path in files[:2]]
    parquet.write_table(pyarrow.table({"image": images}), tmp_path / "some.parquet")
    listed = [*files[2:4], tmp_path / "absent.png"]  # one that is missing is a bad image
    (tmp_path / "list.jsonl").write_text("".join(json.dumps({"image": str(path)}) + "\n" for path in listed))
    lists = tmp_path / "lists"
    lists.mkdir()
    counts = divide([str(tmp_path / "some.parquet"), str(tmp_path / "list.jsonl")], 2, lists)
    assert counts["files"] == 2 and counts["images"] == 0
    assert counts["of_shards"] == [[0, 1], [0, 1]]
    of_table, (*of_list, missing) = [read_division(lists, index, 2, [0, 1]) for index in range(2)]
    assert [item.open().image for item in of_table] == [path.read_bytes() for path in files[:2]]
    assert [Path(item.open().image) for item in of_list] == files[2:4]
    with pytest.raises(ValueError, match=r"absent\.png does not exist"):
        missing.open()


def test_paths_in_a_list_start_from_the_folder_that_the_run_was_begun_with(folder, model_folder, tmp_path, capsys):
    (tmp_path / "list.csv").write_text("image\n0.png\nsub/1.png\n")
    arguments = (tmp_path / "list.csv", "--shards", 1, "--output-dir", tmp_path / "out", "--image-root")
    assert caption(model_folder, *arguments, folder) == 0
    assert merge(tmp_path / "out", tmp_path / "merged.json") == 0
    assert list(json.loads((tmp_path / "merged.json").read_text())) == ["list.csv/0.png", "list.csv/sub/1.png"]
    assert caption(model_folder, *arguments, folder / "sub") == 2
    assert f"was begun with image_root {folder}, here {folder}/sub" in capsys.readouterr().err
    assert caption(model_folder, *arguments, folder / "none") == 2
    assert caption(model_folder, folder, "--output", tmp_path / "c.json", "--image-root", folder) == 2
    assert "--image-root needs parquet or list files" in capsys.readouterr().err


def shards_of(shards: ShardFolder) -> list[list[str]]:
    """The names of the images of each shard."""
    return [[item.name for item in shards.inputs(index)] for index in range(shards.count)]


def test_globs_urls_and_lists_are_divided(folder, tmp_path):
    """An image that two arguments name is in one shard, once."""
    (tmp_path / "list.jsonl").write_text(json.dumps({"image": str(folder / "0.png")}) + "\n")
    url = "http://localhost/a.png"
    paths = [f"{folder}/**/*.png", f"{folder}/sub/1*.png", url, tmp_path / "list.jsonl", folder / "2.png"]
    shards = begin(tmp_path / "out", paths, 3)
    names = [name for own in shards_of(shards) for name in own]
    expected = [str(path) for path in folder.rglob("*.png")] + [url, f"{tmp_path}/list.jsonl/{folder}/0.png"]
    assert sorted(names) == sorted(expected)
    assert max(map(len, shards_of(shards))) < len(names)
    (remote,) = [item for index in range(3) for item in shards.inputs(index, url_timeout=1.0) if item.name == url]
    assert remote.source == url
    for index in range(3):
        write_shard(shards, index)
    assert merge(shards.folder, tmp_path / "merged.json") == 0
    assert len(json.loads((tmp_path / "merged.json").read_text())) == len(names)
    one = begin(tmp_path / "one", [f"{folder}/sub/*.png"], 1)
    assert sorted(shards_of(one)[0]) == sorted(path.name for path in (folder / "sub").iterdir())


def test_a_data_set_is_divided_by_its_rows(folder, tmp_path, capsys):
    import pyarrow
    from pyarrow import parquet

    def write(first: int) -> None:
        contents = [path.read_bytes() for path in sorted(folder.glob("*.png"))[first:]]
        parquet.write_table(pyarrow.table({"image": contents}), tmp_path / "in.parquet")

    write(0)
    run = {**RUN, "shards": 4, "inputs": [], "dataset": {"name": str(tmp_path / "in.parquet"), "split": None}}
    shards = ShardFolder.begin(tmp_path / "out", [], run)
    assert shards_of(shards) == [["train/0"], ["train/1", "train/2"], ["train/3"], ["train/4", "train/5"]]
    assert shards.inputs(1)[1].open().content == sorted(folder.glob("*.png"))[2].read_bytes()
    assert shards.metadata(1)["inputs"]["rows"] == [1, 3]
    write_shard(shards, 0, [{"name": "train/1", "caption": "a"}])
    for index in range(1, 4):
        write_shard(shards, index)
    assert merge(shards.folder, tmp_path / "merged.json") == 2
    assert "has train/1, which belongs to another shard" in capsys.readouterr().err
    with pytest.raises(UserError, match="begun with dataset"):
        ShardFolder.begin(tmp_path / "out", [], run | {"dataset": {"name": "other", "split": None}})
    write(1)
    with pytest.raises(UserError, match="has changed since the run was begun"):
        ShardFolder.open_existing(shards.folder).inputs(0)


def test_a_folder_as_a_data_set_is_told_by_the_names_of_its_images(folder, tmp_path):
    copy = shutil.copytree(folder / "sub", tmp_path / "in")
    run = {**RUN, "shards": 2, "inputs": [], "dataset": {"name": str(copy), "split": None}}
    shards = ShardFolder.begin(tmp_path / "out", [], run)
    os.utime(copy / "1.png")  # a row of a list is an image file, whatever it holds
    assert len(ShardFolder.open_existing(shards.folder).inputs(0)) == 3
    (copy / "1.png").rename(copy / "99.png")
    with pytest.raises(UserError, match="has changed since the run was begun"):
        ShardFolder.open_existing(shards.folder).inputs(0)


@pytest.mark.slow
def test_the_shards_of_a_data_set_have_the_captions_of_one_run(folder, model_folder, tmp_path):
    """With processes that read, too: the rows are read by the one that has opened the data set."""
    arguments = ("--dataset", folder / "sub", "--num-workers", 1)
    assert caption(model_folder, *arguments, "--output", tmp_path / "alone.json") == 1
    assert caption(model_folder, *arguments, "--shards", 2, "--output-dir", tmp_path / "out") == 1
    assert merge(tmp_path / "out", tmp_path / "merged.json") == 1
    assert json.loads((tmp_path / "merged.json").read_text()) == json.loads((tmp_path / "alone.json").read_text())


def test_merging_writes_the_sidecars_of_a_run(folder, tmp_path, capsys):
    copy = shutil.copytree(folder, tmp_path / "in")
    shards = begin(tmp_path / "out", [copy], 2)
    for index in range(2):
        captions = [{"name": item.name, "caption": f"of {item.name}"} for item in shards.inputs(index)]
        write_shard(shards, index, captions)

    def texts() -> dict[str, str]:
        return {path.relative_to(copy).as_posix(): path.read_text() for path in copy.rglob("*.txt")}

    def write(*options) -> int:
        return main(["caption", "--merge", str(shards.folder), "--sidecar", "txt", *options])

    (first, *_), _ = names = shards_of(shards)
    (copy / first).with_suffix(".txt").write_text("mine")
    assert write() == 2
    assert f"{(copy / first).with_suffix('.txt')} exists; pass --on-existing skip" in capsys.readouterr().err
    assert write("--on-existing", "append", "--output", str(tmp_path / "merged.json")) == 0
    assert "skipped 0, wrote 12, failed 0" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "merged.json").read_text())) == 12
    expected = {f"{name.removesuffix('.png')}.txt": f"of {name}\n" for name in chain.from_iterable(names)}
    expected[f"{first.removesuffix('.png')}.txt"] = f"mine, of {first}\n"
    assert texts() == expected
    (copy / names[1][0]).with_suffix(".txt").unlink()  # as if the command had been killed
    assert write("--on-existing", "append") == 0
    assert "skipped 11, wrote 1, failed 0" in capsys.readouterr().err
    assert texts() == expected


def test_merging_names_the_captions_of_files_that_changed(folder, tmp_path, capsys):
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            tar.add(folder / "0.png", arcname="0.png")
    shards = begin(tmp_path / "out", [tmp_path], 2)
    for index in range(2):
        write_shard(shards, index)
    os.utime(tmp_path / "0.tar")
    arguments = ("--sidecar", "txt", "--sidecar-dir", str(tmp_path / "texts"))
    assert main(["caption", "--merge", str(shards.folder), *arguments]) == 1
    said = capsys.readouterr().err
    assert "cannot write the caption of 0.tar/0.png: it cannot be read: the file has changed since" in said
    assert "wrote 1, failed 1" in said
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.txt")] == ["texts/1.tar/0.txt"]


def test_a_list_that_is_not_the_one_of_the_run_is_refused(folder, tmp_path, capsys):
    shards = begin(tmp_path / "out", [folder], 2)
    path = shards.folder / shards.metadata(0)["inputs"]
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[1:]))
    with pytest.raises(UserError, match=f"lists {len(lines) - 1} images and 0 files, and run.json says {len(lines)}"):
        shards.inputs(0)
    path.unlink()
    with pytest.raises(UserError, match="damaged or missing"):
        shards.inputs(0)
    with shards.claim(0) as writer:
        writer.finish({"counts": {"captioned": 0, "failed": 0}})
    write_shard(shards, 1)
    assert merge(shards.folder, tmp_path / "merged.json") == 2
    assert f"has 0 images, and its list {len(lines)}" in capsys.readouterr().err


def test_a_folder_with_images_beside_a_tar_file_is_refused(folder, tmp_path):
    import pyarrow
    from pyarrow import parquet

    mixed = shutil.copytree(folder, tmp_path / "mixed")
    parquet.write_table(pyarrow.table({"key": ["0"], "url": ["http://localhost/0.png"]}), mixed / "0.parquet")
    assert begin(tmp_path / "out", [mixed], 2).run["counts"]["images"] == 12  # the table only describes images
    tarfile.open(mixed / "0.tar", "w").close()
    with pytest.raises(UserError, match=r"holds both 0\.tar and single images such as 0\.png"):
        begin(tmp_path / "mixed-out", [mixed], 2)


def test_a_file_that_cannot_be_read_is_one_bad_input(folder, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").write_text("damaged")
    with tarfile.open(tmp_path / "in" / "1.tar", "w") as tar:
        tar.add(folder / "0.png", arcname="0.png")
    inputs = begin(tmp_path / "out", [tmp_path / "in"], 1).inputs(0)
    assert [item.name for item in inputs] == ["0.tar", "1.tar/0.png"]
    assert "cannot be read" in inputs[0].problem and inputs[1].problem is None


def test_an_image_that_changes_after_the_division_is_named(folder, tmp_path, image_processor):
    copy = shutil.copytree(folder, tmp_path / "in")
    shards = begin(tmp_path / "out", [copy], 1)
    (copy / "0.png").write_bytes((copy / "2.png").read_bytes())
    (copy / "2.png").unlink()
    summary = Summary(12)
    rows = list(read_rows(shards.inputs(0), image_processor, summary))
    assert len(rows) == 9 and sorted(summary.failed) == ["0.png", "2.png", "sub/damaged.png"]
    assert "has changed since" in summary.failed["0.png"]


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, (0, 1, False)),
        ({"RANK": 3, "WORLD_SIZE": 4, "SLURM_ARRAY_TASK_ID": 9}, (3, 4, False)),
        ({"SLURM_ARRAY_TASK_ID": 5, "SLURM_ARRAY_TASK_COUNT": 8, "SLURM_ARRAY_TASK_MIN": 1}, (4, 8, True)),
        (
            {"SLURM_ARRAY_TASK_ID": 4, "SLURM_ARRAY_TASK_COUNT": 3, "SLURM_ARRAY_TASK_STEP": 2}
            | {"SLURM_ARRAY_TASK_MIN": 0, "SLURM_ARRAY_TASK_MAX": 4},
            (2, 3, True),
        ),
        (
            {"SLURM_ARRAY_TASK_ID": 7, "SLURM_ARRAY_TASK_COUNT": 2}
            | {"SLURM_ARRAY_TASK_MIN": 3, "SLURM_ARRAY_TASK_MAX": 7},
            (7, None, True),
        ),
    ],
)
def test_launchers_give_a_process_its_shards(monkeypatch, variables, place):
    set_launcher(monkeypatch, variables)
    assert distribution() == place


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is ''; expected a number"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK must be smaller"),
        ({"SLURM_ARRAY_TASK_ID": "a"}, "SLURM_ARRAY_TASK_ID is 'a'"),
    ],
)
def test_variables_that_are_not_of_a_launcher_are_named(monkeypatch, variables, message):
    set_launcher(monkeypatch, variables)
    with pytest.raises(UserError, match=message):
        distribution()


@pytest.mark.parametrize("tasks", [[0], [3, 5], [2, 9]])
def test_any_array_does_all_shards(monkeypatch, tasks):
    """Each task begins with its share, and goes on with the others."""
    own = []
    for task in tasks:
        variables = {"ID": task, "COUNT": len(tasks), "MIN": tasks[0], "MAX": tasks[-1]}
        set_launcher(monkeypatch, {f"SLURM_ARRAY_TASK_{name}": value for name, value in variables.items()})
        own.append(own_shards(argparse.Namespace(shards=6, shard_index=None)))
    assert all(sorted(order) == [*range(6)] for order in own)
    assert len({order[0] for order in own}) == len(tasks)


@pytest.mark.slow
def test_processes_do_their_shares(finished, folder, model_folder, tmp_path, monkeypatch, capsys):
    arguments = (folder, "--shards", 3, "--output-dir", tmp_path / "out")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    caption(model_folder, *arguments)
    assert list(shards_in(tmp_path / "out")) == ["shard-00001-of-00003.jsonl"]
    assert merge(tmp_path / "out", tmp_path / "merged.json") == 2
    said = capsys.readouterr().err
    assert "lacks 2 of 3 shards: shard-00000-of-00003.jsonl, shard-00002-of-00003.jsonl" in said
    monkeypatch.setenv("RANK", "0")
    caption(model_folder, *arguments)
    assert shards_in(tmp_path / "out") == shards_in(finished)


def test_two_processes_do_not_write_one_shard(folder, tmp_path):
    shards = begin(tmp_path / "out", [folder], 2)
    pid = os.fork()
    if not pid:
        try:
            with shards.claim(0) as writer:
                writer.add([{"name": "half"}])
                time.sleep(60)
        finally:
            os._exit(1)
    try:
        ends = time.monotonic() + 30
        while not list(shards.folder.glob(".unfinished-shard-*")):
            assert time.monotonic() < ends, "the child does not write"
            time.sleep(0.01)
        with shards.claim(0) as writer:
            assert writer is None
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    write_shard(shards, 0)
    with shards.claim(0) as writer:
        assert writer is None
    assert len(shards.path(0).read_text().splitlines()) == len(shards.inputs(0))
    assert not list(shards.folder.glob(".unfinished*")) and not list(shards.folder.glob(".shard*"))


def test_a_folder_beside_the_shards_is_complete_or_absent(folder, tmp_path):
    shards = begin(tmp_path / "out", [folder], 2)
    written = []

    def write(path: Path, fail: bool = False) -> None:
        path.mkdir()
        (path / "half").write_text("half")
        if fail:
            raise OSError("No space left")
        written.append(path)

    with pytest.raises(OSError, match="No space left"):
        shards.make_folder("language-model", lambda path: write(path, fail=True))
    assert not list(shards.folder.glob("*language-model*"))
    for _ in range(2):
        assert [path.name for path in shards.make_folder("language-model", write).iterdir()] == ["half"]
    assert len(written) == 1


def test_equal_names_and_lost_lines_are_not_merged(folder, tmp_path, capsys):
    shards = begin(tmp_path / "out", [folder], 2)
    write_shard(shards, 0)
    write_shard(shards, 1, [{"name": shards.inputs(0)[0].name, "caption": "b"}])
    assert merge(shards.folder, tmp_path / "merged.json") == 2
    assert f"has {shards.inputs(0)[0].name}, which belongs to another shard" in capsys.readouterr().err
    shards.path(1).unlink()
    write_shard(shards, 1, [{"name": shards.inputs(1)[0].name, "caption": "b"}] * 2)
    assert merge(shards.folder, tmp_path / "merged.json") == 2
    assert f"has {shards.inputs(1)[0].name}, twice" in capsys.readouterr().err
    lines = shards.path(0).read_bytes().splitlines(keepends=True)
    shards.path(0).write_bytes(b"".join(lines[:-1]))
    assert merge(shards.folder, tmp_path / "merged.json") == 2
    assert "its manifest says" in capsys.readouterr().err
    assert not (tmp_path / "merged.json").exists()


def test_a_shard_that_cannot_be_written_is_absent(folder, tmp_path, small_disk):
    shards = begin(small_disk / "out", [folder], 2)
    with pytest.raises(OSError, match="No space left"), shards.claim(0) as writer:
        for _ in range(100):
            writer.add([{"name": "x", "caption": "a" * 10_000}])
        writer.finish({"counts": {}})
    assert not shards_in(shards.folder) and not list(shards.folder.glob(".unfinished*"))
    write_shard(shards, 0)
    assert list(shards_in(shards.folder)) == ["shard-00000-of-00002.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard-index", "0"], "--shard-index needs --shards N"),
        (["--engine", "ray"], "--engine needs --shards N"),
        (["--shards", "2"], "--shards needs --output-dir DIR"),
        (["--shards", "2", "--output-dir", "{out}", "--shard-index", "2"], "expected 0 to 1"),
        (["--shards", "2", "--output-dir", "{out}", "--output", "x.json"], "give --output with --merge"),
        (["--shards", "2", "--output-dir", "{out}", "--overwrite"], "--shards replaces no shards"),
        (["--shards", "2", "--output-dir", "{out}", "--confidence"], "score the file with `vlv score`"),
        (["--merge", "{out}"], "leave out image paths"),
        (["--merge", "{out}", "--model", "x", "--trim"], "leave out --model, image paths, --trim"),
        (["--shards", "2", "--output-dir", "{out}", "--resume"], "--resume cannot be used with --shards"),
        (["--shards", "2", "--output-dir", "{out}", "--sidecar", "txt"], "--sidecar is given with --merge"),
        (["--shards", "2", "--output-dir", "{out}", "--metadata", "xmp"], "--metadata cannot be used with --shards"),
        (["--shards", "2", "--output-dir", "{out}", "--split", "train"], "--split needs --dataset"),
        (["--shards", "2", "--output-dir", "{out}", "--dataset", "x"], "either paths"),
        (["-", "--shards", "2", "--output-dir", "{out}"], "cannot tell whether - has the same list"),
        (["--shards", "2", "--output-dir", "{out}", "--engine", "vllm", "--compile"], "has a cache of its own"),
        (["--shards", "2", "--output-dir", "{out}", "--engine", "ray", "--device", "cuda:1"], "give cpu or cuda"),
        (["--shards", "2", "--output-dir", "{out}", "--engine", "vllm", "--temperature", "1"], "one greedy caption"),
    ],
)
def test_options_that_do_not_fit_are_named(folder, tmp_path, arguments, message, capsys):
    given = [argument.format(out=tmp_path / "out") for argument in arguments]
    assert main(["caption", str(folder), *given]) == 2
    assert message in capsys.readouterr().err


def test_a_prompt_that_is_too_long_is_named_before_the_inputs_are_listed(folder, model_folder, tmp_path, capsys):
    arguments = (folder, "--shards", 2, "--output-dir", tmp_path / "out", "--prompt", "small " * 5000)
    assert caption(model_folder, *arguments) == 2
    assert "--prompt: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("paths", "message"),
    [(["{in}", "{in}/sub"], "lies in"), (["{in}/absent"], "does not exist"), (["{empty}"], "no images in")],
)
def test_inputs_that_do_not_fit_are_named(folder, tmp_path, paths, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        begin(tmp_path / "out", [path.format(**{"in": folder}, empty=tmp_path / "empty") for path in paths], 2)
    assert not list((tmp_path / "out").glob("[!.]*"))


@pytest.mark.slow
def test_a_run_that_is_killed_three_times_loses_nothing(tmp_path, model_folder):
    assert kill_and_go_on(tmp_path, times=3, seed=0, model=str(model_folder)) == []
