"""`vlv caption`, `vlv encode` and `vlv reconstruct`: their outputs, their exit codes and their error messages."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vlv.cli.main import main
from vlv.pipelines import generate_captions

from ..builders import QUERIES, TEXT_WIDTH

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


@pytest.mark.slow
def test_caption_captions_readable_images_and_names_the_others(model_folder, mixed_folder, tmp_path, capsys):
    code, captions = caption(model_folder, tmp_path / "c.json", mixed_folder)
    assert code == 1
    assert sorted(captions) == READABLE
    stderr = capsys.readouterr().err
    for name in UNREADABLE:
        assert f"cannot read {name}: " in stderr
    assert "captioned 5, failed 3" in stderr


@pytest.mark.slow
def test_captions_do_not_depend_on_the_batch_or_the_run(model_folder, mixed_folder, tmp_path):
    one_by_one = caption(model_folder, tmp_path / "1.json", mixed_folder, "--batch-size", 1)
    assert len(set(one_by_one[1].values())) > 2  # otherwise the comparisons below could not fail
    assert caption(model_folder, tmp_path / "2.json", mixed_folder, "--batch-size", 5) == one_by_one
    assert caption(model_folder, tmp_path / "3.json", mixed_folder, "--batch-size", 5) == one_by_one


def test_equal_names_of_two_arguments_do_not_collide(model_folder, mixed_folder, tmp_path):
    files = [mixed_folder / "good.png", mixed_folder / "sub" / "good.png"]
    _, captions = caption(model_folder, tmp_path / "c.json", *files)
    assert sorted(captions) == sorted(path.as_posix() for path in files)


def test_an_interrupted_run_keeps_its_captions(model_folder, mixed_folder, tmp_path, monkeypatch):
    from vlv.captioning import captioner as module

    calls = []

    def interrupt_second_batch(*arguments, **settings):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return generate_captions(*arguments, **settings)

    monkeypatch.setattr(module, "generate_captions", interrupt_second_batch)
    code, captions = caption(model_folder, tmp_path / "c.json", mixed_folder, "--batch-size", 2)
    assert code == 130
    assert sorted(captions) == READABLE[:2]


@pytest.mark.slow
def test_captions_of_embeddings_equal_captions_of_images(model_folder, mixed_folder, tmp_path):
    z = tmp_path / "z.safetensors"
    code = main(["encode", str(mixed_folder), "--model", str(model_folder), "--output", str(z), "--device", "cpu"])
    assert code == 1
    assert {name: tuple(t.shape) for name, t in load_file(z).items()} == dict.fromkeys(READABLE, (QUERIES, TEXT_WIDTH))
    _, from_images = caption(model_folder, tmp_path / "i.json", mixed_folder)
    assert caption(model_folder, tmp_path / "e.json", "--embeddings", z) == (0, from_images)


def reconstruct(model_folder, output_dir, *arguments) -> int:
    command = ["reconstruct", "--model", str(model_folder), "--output-dir", str(output_dir), "--device", "cpu"]
    return main([*command, "--num-inference-steps", "2", *map(str, arguments)])


@pytest.mark.slow
def test_reconstruct_writes_images_and_metrics(model_folder, mixed_folder, tmp_path):
    assert reconstruct(model_folder, tmp_path, mixed_folder, "--batch-size", 2) == 1
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert sorted(report) == ["dataset", "failed", "images", "settings"]
    assert sorted(report["images"]) == READABLE
    assert sorted(report["failed"]) == UNREADABLE
    assert all({"psnr", "ssim"} == set(metrics) for metrics in report["images"].values())
    assert "not meaningful" in report["dataset"]["note"] and report["dataset"]["features"]
    assert Image.open(tmp_path / "reconstructions" / "sub" / "cmyk.JPG.png").size == (32, 32)
    pair = Image.open(tmp_path / "side_by_side" / "good.png.png")
    assert pair.size == (64, 32)
    reconstruction = Image.open(tmp_path / "reconstructions" / "good.png.png")
    assert pair.crop((32, 0, 64, 32)).tobytes() == reconstruction.tobytes()


@pytest.mark.slow
def test_scheduler_interval_and_metrics_of_reconstructions_are_options(model_folder, mixed_folder, tmp_path, capsys):
    image = mixed_folder / "good.png"

    def generate(name, *arguments):
        assert reconstruct(model_folder, tmp_path / name, image, *arguments) == 0
        report = json.loads((tmp_path / name / "metrics.json").read_text())
        return report, Image.open(tmp_path / name / "reconstructions" / "good.png.png").tobytes()

    report, default = generate("default", "--guidance-scale", 5)
    assert report["settings"]["scheduler"] == "dpm++" and report["settings"]["guidance_interval"] == [0, 1]
    report, own = generate("own", "--guidance-scale", 5, "--scheduler", "own", "--no-metrics")
    assert report["images"] == {"good.png": {}} and "--no-metrics" in report["dataset"]["note"]
    _, early = generate("early", "--guidance-scale", 5, "--guidance-interval", 0, 0.5, "--no-metrics")
    assert len({default, own, early}) == 3
    for arguments, message in (
        (["--guidance-interval", 0.5, 0.5], "--guidance-interval 0.5 0.5 must be two ascending numbers from 0 to 1"),
    ):
        assert reconstruct(model_folder, tmp_path / "error", image, *arguments) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_reconstruction_does_not_depend_on_its_batch(model_folder, mixed_folder, tmp_path):
    reconstruct(model_folder, tmp_path / "batch", mixed_folder, "--batch-size", 2)
    reconstruct(model_folder, tmp_path / "alone", mixed_folder / "good.png")
    in_batch, alone = (Image.open(tmp_path / f / "reconstructions" / "good.png.png") for f in ("batch", "alone"))
    assert in_batch.tobytes() == alone.tobytes()


@pytest.mark.slow
def test_the_sheet_shows_all_images_and_their_captions(model_folder, mixed_folder, tmp_path):
    arguments = [mixed_folder, "--sheet", tmp_path / "s.png"]
    reconstruct(model_folder, tmp_path, *arguments)
    width, height = Image.open(tmp_path / "s.png").size
    assert (width, height) == (5 * (160 + 8) + 8, 2 * 160 + 3 * 8)  # enlarged five times, no captions below

    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({"good.png": "two words and then a few more words"}))
    reconstruct(model_folder, tmp_path, *arguments, "--captions", captions, "--overwrite")
    assert Image.open(tmp_path / "s.png").height > height

    captions.write_text("[]")
    assert reconstruct(model_folder, tmp_path, *arguments, "--captions", captions, "--overwrite") == 2


@pytest.mark.slow
def test_reconstructions_of_embeddings_equal_those_of_images(model_folder, mixed_folder, tmp_path):
    z, image = tmp_path / "z.safetensors", mixed_folder / "good.png"
    main(["encode", str(image), "--model", str(model_folder), "--output", str(z), "--device", "cpu"])
    assert reconstruct(model_folder, tmp_path / "image", image) == 0
    assert reconstruct(model_folder, tmp_path / "embeddings", "--embeddings", z) == 0
    files = [tmp_path / name / "reconstructions" / "good.png.png" for name in ("image", "embeddings")]
    assert Image.open(files[0]).tobytes() == Image.open(files[1]).tobytes()
    assert not (tmp_path / "embeddings" / "side_by_side").exists()  # there are no originals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["caption", "nowhere"], "nowhere does not exist"),
        (["caption"], "image paths or --embeddings"),
        (["caption", ".", "--output", "c.txt"], "must end in .json"),
        (["caption", "tests/conftest.py", "--model", "./nowhere"], "cannot load ./nowhere"),
        (["caption", "tests/conftest.py", "--device", "abacus"], "--device abacus"),
        (["reconstruct", "--embeddings", "nowhere"], "nowhere"),
        (["train", "stage4"], "unknown stage 'stage4'"),
    ],
)
def test_a_wrong_argument_is_explained_without_a_traceback(
    arguments, message, model_folder, tmp_path, monkeypatch, capsys
):
    if "--model" not in arguments and arguments[0] != "train":
        arguments = [*arguments, "--model", str(model_folder)]
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").touch()
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    stderr = capsys.readouterr().err
    assert message in stderr and "Traceback" not in stderr


def test_embeddings_of_another_model_are_refused(model_folder, tmp_path, capsys):
    from safetensors.torch import save_file

    save_file({"a.png": torch.zeros(8, 99)}, tmp_path / "z.safetensors")
    code = main(["caption", "--embeddings", str(tmp_path / "z.safetensors"), "--model", str(model_folder)])
    assert code == 2
    assert "'a.png' has shape (8, 99)" in capsys.readouterr().err


def test_training_names_the_missing_setting(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"vlv train stage1: images is not set"):
        main(["train", "stage1", "--use_cpu", f"--output_dir={tmp_path}"])
    with pytest.raises(SystemExit, match=r"vlv train stage2: pairs is not set"):
        main(["train", "stage2", "--use_cpu", f"--output_dir={tmp_path}"])
    with pytest.raises(SystemExit, match=r"vlv train stage3: images is not set"):
        main(["train", "stage3", "--use_cpu", f"--output_dir={tmp_path}"])
    assert main(["train"]) == 2 and main(["train", "--help"]) == 0
    assert "stage1,stage2,stage3" in capsys.readouterr().out


@pytest.mark.slow
def test_words_are_beside_the_images_that_are_reconstructed(model_folder, mixed_folder, tmp_path, capsys):
    image = mixed_folder / "good.png"

    def generate(name, *arguments):
        assert reconstruct(model_folder, tmp_path / name, image, *arguments) == 0
        return Image.open(tmp_path / name / "reconstructions" / "good.png.png").tobytes()

    words, first = generate("words", "--prompt", "a frog"), generate("first", "--prompt", "a frog", "--prompt-first")
    assert len({words, first, generate("some", "--prompt", "a frog", "--image-tokens", 3)}) == 3
    settings = json.loads((tmp_path / "words" / "metrics.json").read_text())["settings"]
    assert settings["prompt"] == "a frog" and settings["image_tokens"] is None
    assert reconstruct(model_folder, tmp_path / "e", image, "--image-tokens", 9) == 2
    assert "image_tokens is 9; expected 1 to 8" in capsys.readouterr().err


@pytest.mark.slow
def test_embeddings_that_are_fewer_than_those_to_keep_are_named(model_folder, mixed_folder, tmp_path):
    z = tmp_path / "z.safetensors"
    main(["encode", str(mixed_folder / "good.png"), "--model", str(model_folder), "--output", str(z)])
    save_file({name: rows[:3] for name, rows in load_file(z).items()}, z)
    assert reconstruct(model_folder, tmp_path, "--embeddings", z, "--image-tokens", 5) == 1
    failed = json.loads((tmp_path / "metrics.json").read_text())["failed"]
    assert "image_tokens is 5; expected 1 to 3" in failed["good.png"]
