"""`vlv evaluate images` and `vlv evaluate captions`: figures, files, and what they refuse."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlv.cli.main import main

IMAGES = Path(__file__).parent.parent.parent / "examples" / "images"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Six drawings, and six that are mirrored, saved as another format and of another size."""
    root = tmp_path_factory.mktemp("sets")
    (root / "generated").mkdir()
    (root / "reference").mkdir()
    for number in range(1, 7):
        image = Image.open(IMAGES / f"test-{number}.png").convert("RGB")
        image.save(root / "reference" / f"{number}.png")
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((96, 96)).save(root / "generated" / f"{number}.webp")
    return root / "generated", root / "reference"


def evaluate_images(folders: tuple[Path, Path], output: Path, *options: str) -> dict:
    generated, reference = map(str, folders)
    arguments = ["--generated", generated, "--reference", reference, "--output", str(output), "--overwrite"]
    assert main(["evaluate", "images", *arguments, "--features", "scene-classifier", *options]) == 0
    return json.loads(output.read_text())


@pytest.mark.slow
def test_images_are_compared_as_sets_and_in_pairs(folders, tmp_path, capsys):
    found = evaluate_images(folders, tmp_path / "m.json", "--bootstrap", "5")
    same = evaluate_images((folders[1], folders[1]), tmp_path / "same.json", "--bootstrap", "0")
    metrics, equal = found["metrics"], same["metrics"]
    assert metrics["frechet_distance"]["value"] > 100 * equal["frechet_distance"]["value"] >= 0
    assert metrics["gaussian_mmd"]["value"] > equal["gaussian_mmd"]["value"] == pytest.approx(0, abs=1e-6)
    assert metrics["cosine"]["value"] < equal["cosine"]["value"] == pytest.approx(1)
    low, high = metrics["ssim"]["interval"]
    assert low <= metrics["ssim"]["value"] <= high < 1 and "interval" not in equal["ssim"]
    assert found["num_generated"] == found["num_reference"] == found["num_pairs"] == 6
    assert found["features"] == "scene classifier, 256 features" and found["versions"]["torch"]
    assert found["config"]["features"] == "scene-classifier" and "run" not in found["config"]
    assert any("6 images for features of width 256" in note for note in found["notes"])
    assert "| Fréchet distance |" in capsys.readouterr().out


@pytest.mark.slow
def test_statistics_are_written_reused_and_refused_when_stale(folders, tmp_path, capsys):
    file, options = tmp_path / "s.safetensors", ["--bootstrap", "0", "--pair-metrics"]
    first = evaluate_images(folders, tmp_path / "m.json", "--reference-statistics", str(file), *options)
    written = file.stat().st_mtime_ns
    second = evaluate_images(folders, tmp_path / "m.json", "--reference-statistics", str(file), *options)
    assert second["metrics"] == first["metrics"] and file.stat().st_mtime_ns == written
    assert set(first["metrics"]) == {"frechet_distance", "kernel_distance", "gaussian_mmd"}  # no pair metrics
    arguments = ["--output", str(tmp_path / "n.json"), "--features", "scene-classifier", "--reference-statistics"]
    generated = ["evaluate", "images", "--generated", str(folders[0]), "--bootstrap", "0", *arguments, str(file)]
    assert main(generated) == 0  # without the images
    assert json.loads((tmp_path / "n.json").read_text())["metrics"] == first["metrics"]
    assert main([*generated, "--reference", str(folders[0]), "--overwrite"]) == 2  # other images
    assert "is stale: its images had the fingerprint" in capsys.readouterr().err


def test_an_image_that_cannot_be_read_ends_the_evaluation(folders, tmp_path, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n no image")
    arguments = ["--generated", str(tmp_path / "broken"), "--reference", str(folders[1])]
    output = ["--output", str(tmp_path / "m.json")]
    assert main(["evaluate", "images", *arguments, *output, "--features", "scene-classifier"]) == 2
    assert "a.png" in capsys.readouterr().err and not (tmp_path / "m.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reference", "none"], "--reference none is not a folder"),
        ([], "pass --reference DIR, or --reference-statistics FILE"),
        (["--reference-statistics", "none.safetensors"], "there are no statistics at none.safetensors"),
    ],
)
def test_missing_references_are_named(folders, tmp_path, capsys, options, message):
    arguments = [
        "--generated",
        str(folders[0]),
        "--features",
        "scene-classifier",
        "--output",
        str(tmp_path / "m.json"),
    ]
    assert main(["evaluate", "images", *arguments, *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_captions_are_measured_against_references_images_and_objects(
    folders, tmp_path, clip_model, bert_model, capsys
):
    names = [f"{number}.png" for number in range(1, 7)]
    files = {
        "captions": dict.fromkeys(names, "a small dog"),
        "references": {name: ["a small dog", "a cat"] if name == "1.png" else ["a large apple"] for name in names},
        "vocabulary": {"dog": ["puppy"], "apple": []},
    }
    arguments = [
        "--images",
        str(folders[1]),
        "--clip",
        str(clip_model),
        "--bert",
        str(bert_model),
        "--bootstrap",
        "20",
    ]
    arguments += ["--tokenizer", str(clip_model), "--max-new-tokens", "50"]
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        arguments += [f"--{name}", str(tmp_path / f"{name}.json")]
    assert main(["evaluate", "captions", *arguments, "--output", str(tmp_path / "m.json")]) == 0
    found = json.loads((tmp_path / "m.json").read_text())
    metrics = {name: one["value"] for name, one in found["metrics"].items()}
    assert metrics["chair_i"] == pytest.approx(5 / 6, abs=1e-6) and metrics["ended"] == 1 and metrics["words"] == 3
    assert 0 < metrics["cider_d"] < 10 and 0 < metrics["bert_score"] < 1 and 0 <= metrics["clip_score"] <= 2.5
    assert found["num_captions"] == 6 and "| CIDEr-D |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--clip", "x"], "CLIPScore needs both --clip MODEL and --images DIR"),
        (["--objects", "x"], "--objects needs --vocabulary FILE"),
        (["--vocabulary", "x"], "--vocabulary needs --objects FILE, or --references"),
        (["--bert", "x"], "pass --references FILE with --bert"),
        (["--references", "none.json"], "none.json cannot be read"),
    ],
)
def test_incomplete_options_are_refused(tmp_path, capsys, options, message):
    (tmp_path / "c.json").write_text('{"a.png": "a dog"}')
    output = ["--output", str(tmp_path / "m.json")]
    assert main(["evaluate", "captions", "--captions", str(tmp_path / "c.json"), *options, *output]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "m.json").exists()


def test_images_that_fit_two_references_are_refused_unless_the_sets_alone_are_compared(folders, tmp_path, capsys):
    for place in ("x", "y"):
        (tmp_path / "reference" / place).mkdir(parents=True)
        for number in (1, 2):
            source = folders[1] / f"{number}.png"
            (tmp_path / "reference" / place / source.name).write_bytes(source.read_bytes())
    arguments = ["--generated", str(folders[1]), "--reference", str(tmp_path / "reference"), "--bootstrap", "0"]
    arguments += ["--features", "scene-classifier", "--output", str(tmp_path / "m.json")]
    assert main(["evaluate", "images", *arguments]) == 2
    assert "'1.png' could be 'x/1.png' or 'y/1.png'" in capsys.readouterr().err
    assert main(["evaluate", "images", *arguments, "--pair-metrics"]) == 0
    assert json.loads((tmp_path / "m.json").read_text())["num_pairs"] == 0


def test_statistics_of_pytorch_fid_are_refused_for_other_features(folders, tmp_path, capsys):
    np.savez(tmp_path / "s.npz", mu=np.zeros(256), sigma=np.eye(256))
    arguments = ["--generated", str(folders[0]), "--reference-statistics", str(tmp_path / "s.npz")]
    arguments += ["--features", "scene-classifier", "--output", str(tmp_path / "m.json")]
    assert main(["evaluate", "images", *arguments]) == 2
    assert "s.npz: the statistics of pytorch-fid are of Inception's features" in capsys.readouterr().err


def test_without_inception_the_features_that_need_nothing_are_named(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # no weights of Inception, with or without its package
    output = tmp_path / "m.json"
    command = ["evaluate", "images", "--generated", str(folders[0]), "--reference", str(folders[1])]
    assert main([*command, "--output", str(output)]) == 2
    stderr = capsys.readouterr().err
    assert "--features inception: " in stderr and "torch-fidelity" in stderr
    assert "features that need no other package or download: --features scene-classifier" in stderr
    assert main([*command, "--output", str(output), "--features", "scene-classifier", "--pair-metrics"]) == 0


@pytest.mark.parametrize("model", ["scene-classifier", "inception", "dinov2"])
def test_clip_must_be_a_model_that_embeds_texts(folders, tmp_path, dinov2_model, capsys, model):
    (tmp_path / "c.json").write_text('{"1.png": "a dog"}')
    clip = str(dinov2_model) if model == "dinov2" else model
    arguments = ["--captions", str(tmp_path / "c.json"), "--images", str(folders[1]), "--clip", clip]
    assert main(["evaluate", "captions", *arguments, "--output", str(tmp_path / "m.json")]) == 2
    stderr = capsys.readouterr().err
    assert f"--clip {clip}" in stderr and ("embeds no texts" in stderr or model != "dinov2")
    assert "features of images" not in stderr  # refused before they are computed


def test_empty_captions_of_a_file_are_counted_and_noted(tmp_path, capsys):
    (tmp_path / "c.json").write_text(json.dumps({"a.png": "a small dog", "b.png": ""}))
    output = tmp_path / "m.json"
    command = ["evaluate", "captions", "--captions", str(tmp_path / "c.json"), "--output", str(output)]
    assert main([*command, "--bootstrap", "0"]) == 0
    found = json.loads(output.read_text())
    assert found["metrics"]["words"]["value"] == 1.5 and found["num_captions"] == 2
    assert found["notes"] == ["1 of 2 captions are empty, such as that of 'b.png'; they count"]
    assert "note: 1 of 2 captions are empty" in capsys.readouterr().out
