"""The commands do what their help says, and say in words what they cannot do."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vlv.cli.main import main
from vlv.cli.output import IncrementalJson
from vlv.files import write_atomically

READABLE = ["good.png", "palette.png", "sixteen.png", "sub/cmyk.JPG", "sub/good.png"]
UNREADABLE = ["empty.webp", "text.png", "truncated.jpg"]


def caption(model_folder, output, *arguments) -> tuple[int, dict[str, str]]:
    command = [
        "caption",
        "--model",
        str(model_folder),
        "--output",
        str(output),
        "--max-new-tokens",
        "6",
        "--device",
        "cpu",
    ]
    code = main([*command, *map(str, arguments)])
    return code, json.loads(output.read_text())


def test_captions_all_images_and_names_what_is_none(model_folder, mixed_folder, tmp_path, capsys):
    code, captions = caption(model_folder, tmp_path / "c.json", mixed_folder)
    assert code == 1
    assert sorted(captions) == READABLE
    said = capsys.readouterr().err
    for name in UNREADABLE:
        assert f"cannot read {name}: " in said
    assert "captioned 5, failed 3" in said


def test_captions_do_not_depend_on_the_batch_or_the_run(model_folder, mixed_folder, tmp_path):
    one_by_one = caption(model_folder, tmp_path / "1.json", mixed_folder, "--batch-size", 1)
    assert len(set(one_by_one[1].values())) > 2  # or nothing below could fail
    assert caption(model_folder, tmp_path / "2.json", mixed_folder, "--batch-size", 5) == one_by_one
    assert caption(model_folder, tmp_path / "3.json", mixed_folder, "--batch-size", 5) == one_by_one


def test_equal_names_of_two_arguments_do_not_collide(model_folder, mixed_folder, tmp_path):
    files = [mixed_folder / "good.png", mixed_folder / "sub" / "good.png"]
    _, captions = caption(model_folder, tmp_path / "c.json", *files)
    assert sorted(captions) == sorted(path.as_posix() for path in files)


def test_resume_keeps_what_was_done(model_folder, mixed_folder, tmp_path):
    output = tmp_path / "c.json"
    output.write_text('{"good.png": "kept as it was"}')
    _, captions = caption(model_folder, output, mixed_folder, "--resume")
    assert captions["good.png"] == "kept as it was"
    assert sorted(captions) == READABLE


def test_an_interrupted_run_keeps_what_is_done(model_folder, mixed_folder, tmp_path, monkeypatch):
    from vlv.cli import caption as module

    calls = []

    def interrupted(*arguments):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return original(*arguments)

    original = module.write_captions
    monkeypatch.setattr(module, "write_captions", interrupted)
    code, captions = caption(model_folder, tmp_path / "c.json", mixed_folder, "--batch-size", 2)
    assert code == 130
    assert sorted(captions) == READABLE[:2]


def test_embeddings_stand_for_their_images(model_folder, mixed_folder, tmp_path):
    z = tmp_path / "z.safetensors"
    code = main(["encode", str(mixed_folder), "--model", str(model_folder), "--output", str(z), "--device", "cpu"])
    assert code == 1
    assert {name: tuple(t.shape) for name, t in load_file(z).items()} == dict.fromkeys(READABLE, (8, 32))
    _, from_images = caption(model_folder, tmp_path / "i.json", mixed_folder)
    assert caption(model_folder, tmp_path / "e.json", "--embeddings", z) == (0, from_images)


def test_reconstructs_with_metrics(model_folder, mixed_folder, tmp_path):
    out = tmp_path / "out"
    command = ["reconstruct", "--model", str(model_folder), "--num-inference-steps", "2", "--device", "cpu"]
    code = main(
        [*command, str(mixed_folder), "--output-dir", str(out), "--batch-size", "2", "--sheet", str(out / "s.png")]
    )
    assert code == 1
    report = json.loads((out / "metrics.json").read_text())
    assert sorted(report["pictures"]) == READABLE
    assert sorted(report["failed"]) == UNREADABLE
    assert all({"psnr", "ssim"} == set(figures) for figures in report["pictures"].values())
    assert "too few" in report["set"]["note"] and report["set"]["features"]
    assert Image.open(out / "reconstructions" / "sub" / "cmyk.JPG.png").size == (32, 32)
    assert Image.open(out / "side_by_side" / "good.png.png").size == (64, 32)

    width, height = Image.open(out / "s.png").size
    assert (width, height) == (5 * (160 + 8) + 8, 2 * 160 + 3 * 8)  # enlarged five times, no captions below

    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({"good.png": "two words and then a few more words"}))
    drawn = [*command, str(mixed_folder), "--output-dir", str(out), "--sheet", str(out / "s.png")]
    main([*drawn, "--captions", str(captions)])
    assert Image.open(out / "s.png").height > height
    captions.write_text("[]")
    assert main([*drawn, "--captions", str(captions)]) == 2

    alone = tmp_path / "alone"
    main([*command, str(mixed_folder / "good.png"), "--output-dir", str(alone)])
    in_batch, by_itself = (Image.open(f / "reconstructions" / "good.png.png") for f in (out, alone))
    assert in_batch.tobytes() == by_itself.tobytes()


def test_reconstructs_from_embeddings(model_folder, mixed_folder, tmp_path):
    z = tmp_path / "z.safetensors"
    main(
        ["encode", str(mixed_folder / "good.png"), "--model", str(model_folder), "--output", str(z), "--device", "cpu"]
    )
    for name, source in (("i", [str(mixed_folder / "good.png")]), ("e", ["--embeddings", str(z)])):
        command = ["reconstruct", "--model", str(model_folder), "--num-inference-steps", "2", "--device", "cpu"]
        assert main([*command, *source, "--output-dir", str(tmp_path / name)]) == 0
    images = [Image.open(tmp_path / name / "reconstructions" / "good.png.png") for name in "ie"]
    assert images[0].tobytes() == images[1].tobytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["caption", "nowhere"], "nowhere does not exist"),
        (["caption"], "image paths or --embeddings"),
        (["caption", ".", "--output", "c.txt"], "must end in .json"),
        (["caption", "tests/conftest.py", "--model", "./nowhere"], "cannot load ./nowhere"),
        (["caption", "tests/conftest.py", "--device", "abacus"], "--device abacus"),
        (["reconstruct", "--embeddings", "nowhere"], "nowhere"),
        (["train", "stage3"], "unknown stage 'stage3'"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(arguments, words, model_folder, tmp_path, monkeypatch, capsys):
    if "--model" not in arguments and arguments[0] != "train":
        arguments = [*arguments, "--model", str(model_folder)]
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").touch()
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half of")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_run_cut_short_before_its_first_result_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    path.write_text('{"a": 1}')
    with pytest.raises(KeyboardInterrupt), IncrementalJson(path):
        raise KeyboardInterrupt
    assert path.read_text() == '{"a": 1}'


def test_file_names_that_are_no_unicode_are_kept(tmp_path):
    with IncrementalJson(tmp_path / "results.json") as results:
        results.save({"caf\udce9.png": "a dog"})
    assert json.loads((tmp_path / "results.json").read_text()) == {"caf\udce9.png": "a dog"}


def test_a_growing_file_is_whole_at_every_moment(tmp_path):
    path = tmp_path / "results.json"
    with IncrementalJson(path) as results:
        for number in range(50):
            results.save({str(number): "x" * 100})
            assert set(json.loads(path.read_text())) <= {str(n) for n in range(number + 1)}
    assert len(json.loads(path.read_text())) == 50
    assert list(tmp_path.iterdir()) == [path]


def test_embeddings_of_another_model_are_refused(model_folder, tmp_path, capsys):
    from safetensors.torch import save_file

    save_file({"a.png": torch.zeros(8, 99)}, tmp_path / "z.safetensors")
    code = main(["caption", "--embeddings", str(tmp_path / "z.safetensors"), "--model", str(model_folder)])
    assert code == 2
    assert "'a.png' has shape (8, 99)" in capsys.readouterr().err


def test_training_says_what_is_missing(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"vlv train stage1: images is not set"):
        main(["train", "stage1", "--use_cpu", f"--output_dir={tmp_path}"])
    with pytest.raises(SystemExit, match=r"vlv train stage2: pairs is not set"):
        main(["train", "stage2", "--use_cpu", f"--output_dir={tmp_path}"])
    assert main(["train"]) == 2 and main(["train", "--help"]) == 0
    assert "stage1,stage2" in capsys.readouterr().out
