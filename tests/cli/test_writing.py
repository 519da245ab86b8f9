"""Outputs: checked before a model is loaded, complete at every moment, never lost to one bad name or a full disk."""

import errno
import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vlv import hub
from vlv.captioning.output import GrowingJson
from vlv.cli.encode import tensor_name
from vlv.cli.main import main
from vlv.cli.reconstruct import output_name
from vlv.files import write_atomically

COMMANDS = {
    "caption": ("--output", "c.json", ["--max-new-tokens", "4"]),
    "encode": ("--output", "z.safetensors", []),
    "reconstruct": ("--output-dir", "r", ["--num-inference-steps", "1"]),
}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Files cannot grow beyond `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def run(command, images, model, output, *more) -> int:
    option, _, settings = COMMANDS[command]
    return main([command, *map(str, (images, "--model", model, option, output, "--device", "cpu", *settings, *more))])


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_that_cannot_be_written_is_named_before_the_model_is_loaded(command, tmp_path, images, capsys):
    images[0].save(tmp_path / "a.png")
    (tmp_path / "file").touch()
    _, name, _ = COMMANDS[command]
    output = tmp_path / "file" / "deep" / name
    assert run(command, tmp_path / "a.png", "./no_model", output) == 2
    said = capsys.readouterr().err
    assert f"{output} cannot be written: {tmp_path / 'file'} is not a folder" in said and said.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_without_permission_is_named_before_the_model_is_loaded(command, folder_of_nobody, images, capsys):
    images[0].save(folder_of_nobody / "a.png")
    (folder_of_nobody / "locked").mkdir(mode=0o500)
    _, name, _ = COMMANDS[command]
    assert run(command, folder_of_nobody / "a.png", "./no_model", folder_of_nobody / "locked" / name) == 2
    said = capsys.readouterr().err
    assert f"no permission to write into {folder_of_nobody / 'locked'}" in said and said.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_an_existing_output_is_replaced_only_where_that_is_said(command, tmp_path, model_folder, images, capsys):
    images[0].save(tmp_path / "a.png")
    _, name, _ = COMMANDS[command]
    output = tmp_path / name
    assert run(command, tmp_path / "a.png", model_folder, output) == 0
    written = output if output.is_file() else output / "metrics.json"
    written.write_text("mine")
    assert run(command, tmp_path / "a.png", model_folder, output) == 2
    assert f"{written} exists; pass " in capsys.readouterr().err and written.read_text() == "mine"
    assert run(command, tmp_path / "a.png", model_folder, output, "--overwrite") == 0
    assert written.read_bytes() != b"mine"


@pytest.mark.parametrize("name", ["reconstructions", "side_by_side", "metrics.json"])
def test_what_is_in_the_way_of_reconstructions_is_named_before_the_model_is_loaded(name, tmp_path, images, capsys):
    images[0].save(tmp_path / "a.png")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / name).mkdir() if name == "metrics.json" else (tmp_path / "r" / name).touch()
    assert run("reconstruct", tmp_path / "a.png", "./no_model", tmp_path / "r", "--overwrite") == 2
    assert f"{tmp_path / 'r' / name} is " in capsys.readouterr().err


def test_reconstructions_without_metrics_are_not_replaced(tmp_path, images, capsys):
    images[0].save(tmp_path / "a.png")
    (tmp_path / "r" / "reconstructions").mkdir(parents=True)
    (tmp_path / "r" / "reconstructions" / "a.png.png").write_text("mine")
    assert run("reconstruct", tmp_path / "a.png", "./no_model", tmp_path / "r") == 2
    assert "reconstructions/a.png.png exists; pass --overwrite" in capsys.readouterr().err


def test_a_link_and_permissions_of_an_output_stay(tmp_path):
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "real.json").chmod(0o600)
    (tmp_path / "link.json").symlink_to("real.json")
    write_atomically(tmp_path / "link.json", lambda path: path.write_text("new"))
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "real.json").read_text() == "new"
    assert (tmp_path / "real.json").stat().st_mode & 0o777 == 0o600


def test_a_disk_that_is_too_small_for_the_embeddings_is_named(tmp_path, model_folder, images, monkeypatch, capsys):
    images[0].save(tmp_path / "a.png")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    monkeypatch.setattr(hub, "load_encoder", lambda *args, **kwargs: pytest.fail("the model is loaded"))
    assert run("encode", tmp_path / "a.png", model_folder, tmp_path / "z.safetensors") == 2
    assert "and its disk has 0.0 GB free" in capsys.readouterr().err and not (tmp_path / "z.safetensors").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_ends_the_run_in_one_line(command, tmp_path, model_folder, images, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(6):
        images[number % len(images)].save(folder / f"{number}-{'long name ' * 18}.png")
    _, name, _ = COMMANDS[command]
    output = tmp_path / name
    with largest_file(1700):
        code = run(command, folder, model_folder, output, "--batch-size", 1)
    said = capsys.readouterr().err
    assert code == 2 and "File too large" in said and str(output.with_suffix("")) in said and said.count("\n") == 1
    if command == "caption":
        assert 0 < len(json.loads(output.read_text())) < 6
    assert not list(tmp_path.rglob(".*"))


def test_a_growing_file_is_complete_json_at_every_moment(tmp_path):
    path = tmp_path / "results.json"
    with GrowingJson(path, {"kept": 1}) as results:
        assert not path.exists()
        for number in range(50):
            results.add({f"{number}a": "x" * number, f"{number}b": {"psnr": 1.5}})
            assert len(json.loads(path.read_text())) == 3 + 2 * number
    assert list(json.loads(path.read_text()))[:3] == ["kept", "0a", "0b"]
    assert list(tmp_path.iterdir()) == [path]


def test_an_addition_writes_no_more_than_itself(tmp_path):
    with GrowingJson(tmp_path / "results.json") as results:
        results.add({f"{number}": "x" * 1000 for number in range(1000)})
        with largest_file((tmp_path / "results.json").stat().st_size + 20):
            results.add({"a": "b"})  # rewriting the file under another name would be refused as well
        before = (tmp_path / "results.json").stat().st_ino
        results.add({"c": "d"})
        assert (tmp_path / "results.json").stat().st_ino == before


def test_a_growing_object_has_a_head_and_a_tail(tmp_path):
    path = tmp_path / "metrics.json"
    with GrowingJson(path, head={"settings": {"seed": 1}}) as report:
        report.add({"a.png": {"psnr": 1.0}})
        assert json.loads(path.read_text()) == {"settings": {"seed": 1}, "images": {"a.png": {"psnr": 1.0}}}
        report.add({"b.png": {}})
        report.close({"failed": {"c.png": "why"}})
    assert json.loads(path.read_text()) == {
        "settings": {"seed": 1},
        "images": {"a.png": {"psnr": 1.0}, "b.png": {}},
        "failed": {"c.png": "why"},
    }


def test_an_addition_that_fails_leaves_the_earlier_ones(tmp_path):
    path = tmp_path / "results.json"
    with GrowingJson(path) as results:
        results.add({"a": "first"})
        with largest_file(60), pytest.raises(OSError, match="File too large") as error:
            results.add({"b": "x" * 100})
        assert error.value.filename == str(path)
        assert json.loads(path.read_text()) == {"a": "first"}
        results.add({"c": "third"})
    assert json.loads(path.read_text()) == {"a": "first", "c": "third"}


def test_a_run_without_results_writes_an_empty_object(tmp_path):
    with GrowingJson(tmp_path / "results.json"):
        pass
    assert json.loads((tmp_path / "results.json").read_text()) == {}


def test_a_run_interrupted_before_its_first_result_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    path.write_text('{"a": 1}')
    with pytest.raises(KeyboardInterrupt), GrowingJson(path):
        raise KeyboardInterrupt
    assert path.read_text() == '{"a": 1}'


def test_file_names_that_are_not_unicode_are_kept(tmp_path):
    with GrowingJson(tmp_path / "results.json") as results:
        results.add({"caf\udce9.png": "a dog", "caf\u00e9.png": "a cat"})
    assert json.loads((tmp_path / "results.json").read_text()) == {"caf\udce9.png": "a dog", "caf\u00e9.png": "a cat"}


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half of")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["a" * 250 + ".png", "\u00e9" * 120 + ".png", "\U0001f600" * 60 + ".jpeg"])
def test_the_longest_name_of_a_file_can_be_written(tmp_path, name):
    write_atomically(tmp_path / name, lambda path: path.write_bytes(b"x"))
    assert (tmp_path / name).read_bytes() == b"x"


def test_names_of_reconstructions_are_unique_and_fit_into_a_file_system(tmp_path):
    names = ["a.png", "a.jpg", "../a.png", "/a/b.png", "a" * 250 + ".png", "a" * 250 + ".jpg", "\u00e9" * 125 + ".png"]
    names.append("\udce9" * 251 + ".png")
    outputs = [output_name(name) for name in names]
    assert outputs[:4] == ["a.png.png", "a.jpg.png", "_/a.png.png", "a/b.png.png"]
    assert len(set(outputs)) == len(names)
    for output in outputs:
        write_atomically(tmp_path / output, lambda path: path.write_bytes(b"x"))


def test_names_that_safetensors_cannot_hold_are_escaped():
    assert tensor_name("caf\udce9.png") == "caf\\udce9.png"
    assert tensor_name("__metadata__") == "./__metadata__" and tensor_name("caf\u00e9.png") == "caf\u00e9.png"


@pytest.mark.slow
def test_one_bad_name_does_not_end_a_run(tmp_path, model_folder, images, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    images[0].save(folder / f"{'long' * 62}.png")
    images[1].save(folder / "b\udce9.png")
    images[2].save(folder / "c.png")
    (folder / "__metadata__").write_bytes((folder / "c.png").read_bytes())
    output = tmp_path / "r"
    (output / "reconstructions" / "c.png.png").mkdir(parents=True)  # a folder is in the way
    assert run("reconstruct", folder, model_folder, output, "--overwrite") == 1
    assert "cannot write the reconstruction of c.png: " in capsys.readouterr().err
    metrics = json.loads((output / "metrics.json").read_text())
    assert list(metrics["failed"]) == ["c.png"] and len(metrics["images"]) == 3
    assert len(list((output / "reconstructions").glob("*.png"))) == 4

    z = tmp_path / "z.safetensors"
    assert run("encode", folder, model_folder, z) == 0
    assert sorted(load_file(z)) == ["./__metadata__", "b\\udce9.png", "c.png", f"{'long' * 62}.png"]
    assert torch.equal(load_file(z)["./__metadata__"], load_file(z)["c.png"])


def test_errors_of_writing_name_the_file(tmp_path):
    with largest_file(10), pytest.raises(OSError) as error:
        write_atomically(tmp_path / "a.png", Image.new("RGB", (64, 64)).save)
    assert error.value.errno == errno.EFBIG and error.value.filename == str(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
