"""`vlv score`, and captions that `vlv caption` chooses and marks by their score."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlv.cli.captions import read_one_text
from vlv.cli.main import main
from vlv.cli.scoring import BatchScorer
from vlv.errors import UserError
from vlv.pipelines import DiffusionScorer, load_reconstruction, to_pixels

EXAMPLES = Path(__file__).parent.parent.parent / "examples" / "images"
SAMPLING = ["--num-captions", 4, "--temperature", 1.5, "--seed", 3]
NAMES = ["0.png", "1.png", "2.png"]
CAPTIONS = {"0.png": "a small dog", "1.png": ["a large apple", "a cat"], "2.png": {"caption": "a frog", "score": 1.0}}


@pytest.fixture(scope="module")
def photos(tmp_path_factory, images) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name, image in zip(NAMES, images, strict=False):
        image.save(folder / name)
    return folder


def write(folder: Path, captions) -> str:
    (folder / "given.json").write_text(json.dumps(captions))
    return str(folder / "given.json")


def score(model, output, *arguments) -> int:
    settings = ("--model", model, "--output", output, "--device", "cpu")
    return main(["score", *map(str, (*settings, *arguments))])


def caption(model, output, *arguments) -> int:
    settings = ("--model", model, "--output", output, "--device", "cpu", "--max-new-tokens", 5)
    return main(["caption", *map(str, (*settings, *arguments))])


def test_score_writes_the_scores_of_one_caption_and_of_several(model_folder, photos, tmp_path, capsys):
    assert score(model_folder, tmp_path / "s.json", photos, "--captions", write(tmp_path, CAPTIONS)) == 0
    found = json.loads((tmp_path / "s.json").read_text())
    pipeline = load_reconstruction(model_folder)
    pixels = to_pixels([pipeline.image_processor.load(photos / name).resize((32, 32)) for name in NAMES])
    scorer = DiffusionScorer.from_pipeline(pipeline)
    two = scorer.score(pixels, [["a small dog"] * 2, CAPTIONS["1.png"], ["a frog"] * 2]).scores
    assert list(found) == NAMES
    assert [found["0.png"], found["2.png"]] == pytest.approx(two[[0, 2], 0].tolist(), abs=2e-6)
    assert found["1.png"] == pytest.approx(two[1].tolist(), abs=2e-6)
    assert two.unique().numel() == 4
    captured = capsys.readouterr()
    assert "4 captions: mean score " in captured.out and "scored 3, failed 0" in captured.err


def test_an_interrupted_run_goes_on_and_has_the_scores_of_one_run(model_folder, photos, tmp_path, monkeypatch, capsys):
    captions, output = ("--captions", write(tmp_path, CAPTIONS), "--batch-size", 1), tmp_path / "s.json"
    assert score(model_folder, tmp_path / "whole.json", photos, *captions) == 0
    whole, said = (tmp_path / "whole.json").read_text(), capsys.readouterr().out
    score_batch, calls = BatchScorer.score, []

    def interrupted(self, *arguments):
        if len(calls) in (0, 2):  # the first run ends before its first batch, the second one after it
            calls.append(0)
            raise KeyboardInterrupt
        calls.append(1)
        return score_batch(self, *arguments)

    monkeypatch.setattr(BatchScorer, "score", interrupted)
    assert score(model_folder, output, photos, *captions) == 130
    assert capsys.readouterr().err == "vlv: interrupted\n" and not output.exists()
    assert score(model_folder, output, photos, *captions) == 130
    assert f"interrupted; the results so far are in {output}; --resume goes on with it" in capsys.readouterr().err
    assert list(json.loads(output.read_text())) == NAMES[:1]
    other = ("--captions", captions[1], "--num-pairs", 2, "--resume")
    assert score(model_folder, output, photos, *other) == 2
    assert "has scores with num_pairs 4, here 2, which cannot be compared" in capsys.readouterr().err
    assert score(model_folder, output, photos, *captions, "--resume") == 0
    captured = capsys.readouterr()
    assert output.read_text() == whole and captured.out == said and "kept 1, scored 2, failed 0" in captured.err


def test_images_without_a_caption_and_captions_that_are_none_are_named(model_folder, mixed_folder, tmp_path, capsys):
    given = {"good.png": "a dog", "palette.png": 3, "sixteen.png": [], "text.png": "a cat", "other.png": "a frog"}
    assert score(model_folder, tmp_path / "s.json", mixed_folder, "--captions", write(tmp_path, given)) == 1
    stderr = capsys.readouterr().err
    assert list(json.loads((tmp_path / "s.json").read_text())) == ["good.png"]
    assert "given.json has no caption of it" in stderr
    assert "given.json: its entry is 3; expected a caption, a list of captions, or an object with caption" in stderr
    assert "cannot read sixteen.png: " in stderr and "cannot read text.png: " in stderr
    assert "note: 1 of the entries of " in stderr and "scored 1, failed 7" in stderr


def test_long_captions_are_counted(model_folder, photos, tmp_path, capsys):
    captions = {
        "0.png": "a small dog at the top left. a large apple is here.",
        "1.png": "a dog " * 9,
        "2.png": "a cat",
    }
    assert score(model_folder, tmp_path / "s.json", photos, "--captions", write(tmp_path, captions)) == 0
    said = (
        "reads 12 tokens at once: 1 captions, which are longer or of an image with a longer one, are scored "
        "sentence by sentence, and 1 sentences are cut"
    )
    assert said in capsys.readouterr().err


def test_score_refuses_what_it_cannot_use(model_folder, stage1_checkpoint, photos, tmp_path, capsys):
    given = write(tmp_path, CAPTIONS)
    for arguments, message in (
        ((model_folder, tmp_path / "s.txt", photos, "--captions", given), "must end in .json"),
        ((model_folder, given, photos, "--captions", given), "given.json exists; pass --resume to go on with it"),
        ((model_folder, tmp_path / "s.json", photos, "--captions", tmp_path / "no.json"), "--captions: "),
        ((model_folder, tmp_path / "s.json", tmp_path / "no", "--captions", given), "no does not exist"),
        ((stage1_checkpoint, tmp_path / "s.json", photos, "--captions", given), f"cannot load {stage1_checkpoint}: "),
    ):
        assert score(*arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "s.json").exists()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_loss_that_is_not_finite_fails_its_image(model_folder, photos, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(model_folder, tmp_path / "vlv")
    (weights,) = (folder / "unet").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["conv_out.bias"] = torch.full_like(tensors["conv_out.bias"], float("nan"))
    save_file(tensors, weights, metadata={"format": "pt"})
    assert caption(folder, tmp_path / "c.json", photos, "--confidence") == 1
    assert json.loads((tmp_path / "c.json").read_text()) == {}
    stderr = capsys.readouterr().err
    assert all(f"cannot score the captions of {name}: the loss is not finite" in stderr for name in NAMES)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal := Terminal())
        assert score(folder, tmp_path / "s.json", photos, "--captions", write(tmp_path, CAPTIONS)) == 1
    assert "100%" in terminal.getvalue() and "| 3/3 [" in terminal.getvalue()


def test_a_caption_without_a_score_is_not_the_best(model_folder, photos, tmp_path, capsys, monkeypatch):
    inner = DiffusionScorer.score

    def spoil(self, *arguments, **options):
        found = inner(self, *arguments, **options)
        found.scores[:, 0] = float("nan")
        return found

    monkeypatch.setattr(DiffusionScorer, "score", spoil)
    options = ("--num-captions", "3", "--best-by", "score", "--confidence")
    assert caption(model_folder, tmp_path / "c.json", photos, *options) == 0
    entries = json.loads((tmp_path / "c.json").read_text())
    assert list(entries) == NAMES and all(abs(entry["score"]) < 1e6 for entry in entries.values())
    assert f"note: {len(NAMES)} captions have no score" in capsys.readouterr().err


@pytest.fixture(scope="module")
def samples(model_folder, photos, tmp_path_factory) -> Path:
    """Four captions of each image."""
    file = tmp_path_factory.mktemp("samples") / "all.json"
    assert caption(model_folder, file, photos, *SAMPLING) == 0
    return file


def test_the_best_caption_is_the_sample_with_the_highest_score(model_folder, photos, samples, tmp_path):
    captions = json.loads(samples.read_text())
    assert all(len(own) == 4 and len(set(own)) > 1 for own in captions.values())
    assert score(model_folder, tmp_path / "s.json", photos, "--captions", samples) == 0
    scores = json.loads((tmp_path / "s.json").read_text())
    least = sorted(max(own) for own in scores.values())[1] - 1e-5
    marks = ["--best-by", "score", "--confidence", "--min-score", least, "--batch-size", 1]
    assert caption(model_folder, tmp_path / "best.json", photos, *SAMPLING, *marks) == 0
    for name, entry in json.loads((tmp_path / "best.json").read_text()).items():
        best = max(range(4), key=scores[name].__getitem__)
        assert entry["caption"] == captions[name][best]
        assert entry["score"] == pytest.approx(scores[name][best], abs=2e-6)
        assert entry["confident"] == (scores[name][best] > least)
    assert sum(max(own) > least for own in scores.values()) == 2


def test_samples_depend_on_the_seed_and_not_on_the_other_images(model_folder, photos, samples, tmp_path):
    found = {"2.png": json.loads(samples.read_text())["2.png"]}
    assert caption(model_folder, tmp_path / "one.json", photos / "2.png", *SAMPLING) == 0
    assert json.loads((tmp_path / "one.json").read_text()) == found
    assert caption(model_folder, tmp_path / "other.json", photos / "2.png", *SAMPLING[:-1], 4) == 0
    assert json.loads((tmp_path / "other.json").read_text()) != found


def test_one_caption_is_sampled_at_a_temperature(model_folder, photos, tmp_path):
    options = ["--temperature", 2.0, "--max-new-tokens", 4]
    found = []
    for seed in (1, 1, 2):
        output = tmp_path / f"{len(found)}.json"
        assert caption(model_folder, output, photos / "2.png", *options, "--seed", seed) == 0
        found.append(json.loads(output.read_text())["2.png"])
    assert isinstance(found[0], str) and found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--best-by", "score"], "--best-by needs --num-captions 2 or more"),
        (["--temperature", "0.5", "--num-beams", "2"], "--temperature samples captions; leave out --num-beams"),
        (["--seed", "1"], "--seed needs --num-captions 2 or more, or --temperature"),
        (["--min-score", "0.1"], "--min-score needs --confidence"),
        (["--num-captions", "2", "--num-pairs", "2"], "--num-pairs needs --best-by score or --confidence"),
        (["--num-captions", "2", "--temperature", "0"], "--temperature is 0; expected a number above 0"),
        (["--num-captions", "2", "--temperature", "nan"], "--temperature is nan; expected a number above 0"),
        (["--num-captions", "2", "--seed", "-1"], "--seed is -1; expected 0 or more"),
        (["--num-captions", "2", "--num-beams", "2"], "leave out --num-beams and --as-original"),
        (["--compile", "--num-beams", "2"], "--compile compiles the step that writes one token"),
        (["--compile", "--as-original"], "--compile compiles the step that writes one token"),
        (["--num-captions", "2", "--confidence"], "add --best-by score, or leave out --num-captions"),
        (["--confidence", "--min-score", "nan"], "--min-score is nan"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message, photos, tmp_path, capsys):
    assert caption("no-model", tmp_path / "c.json", photos, *options) == 2
    assert message in capsys.readouterr().err


def test_embeddings_have_no_score(tmp_path, capsys):
    assert caption("no-model", tmp_path / "c.json", "--embeddings", "z.safetensors", "--confidence") == 2
    assert "scores are of images, and --embeddings has none" in capsys.readouterr().err


def test_resume_goes_on_with_the_same_form_and_names_other_settings(model_folder, photos, tmp_path, capsys):
    output, best = tmp_path / "c.json", ["--num-captions", 2, "--best-by", "score"]
    assert caption(model_folder, output, photos / "0.png", *best, "--num-pairs", 1) == 0
    first = json.loads(output.read_text())
    assert caption(model_folder, output, photos, *best, "--num-pairs", 2, "--resume-mixed") == 0
    found = json.loads(output.read_text())
    assert list(found) == NAMES and found["0.png"] == first["0.png"] and isinstance(first["0.png"], str)
    assert "other settings (num_pairs 1, here 2)" in capsys.readouterr().err
    assert caption(model_folder, output, photos, "--resume", "--confidence") == 2
    said = f"--resume: {output} has one caption of each image, and this run writes captions with scores"
    assert said in capsys.readouterr().err
    assert json.loads(output.read_text()) == found


def test_scores_of_another_text_to_image_model_or_number_of_pairs_are_not_mixed(
    model_folder, photos, tmp_path, capsys
):
    folder, output = shutil.copytree(model_folder, tmp_path / "vlv"), tmp_path / "c.json"
    marks = ["--confidence", "--min-score", 0.1]
    assert caption(folder, output, photos / "0.png", *marks, "--num-pairs", 1) == 0
    written = output.read_bytes()
    assert caption(folder, output, photos, *marks, "--num-pairs", 2, "--resume") == 2
    assert "has scores with num_pairs 1, here 2, which cannot be compared" in capsys.readouterr().err
    (weights,) = (folder / "unet").glob("*.safetensors")
    save_file({k: 2 * v for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    assert caption(folder, output, photos, *marks, "--num-pairs", 1, "--resume") == 2
    assert "has scores with text_to_image " in capsys.readouterr().err
    assert output.read_bytes() == written


def test_resume_marks_the_kept_captions_by_the_new_min_score(model_folder, photos, tmp_path, capsys):
    output, marks = tmp_path / "c.json", ["--confidence", "--num-pairs", 1]
    assert caption(model_folder, output, photos / "0.png", *marks, "--min-score", 9) == 0
    assert not json.loads(output.read_text())["0.png"]["confident"] and "note:" not in capsys.readouterr().err
    assert caption(model_folder, output, photos / "0.png", *marks, "--min-score", -9, "--resume") == 0
    assert json.loads(output.read_text())["0.png"]["confident"]


def test_the_default_min_score_of_another_model_has_a_note(model_folder, photos, tmp_path, capsys):
    assert caption(model_folder, tmp_path / "c.json", photos / "0.png", "--confidence", "--num-pairs", 1) == 0
    said = "note: the default --min-score, 0.08, was measured for the embedded miniature with --num-pairs 4"
    assert said in capsys.readouterr().err


def test_a_file_of_captions_in_any_form_is_text_for_the_sheet(tmp_path):
    given = write(tmp_path, CAPTIONS)
    texts = {"0.png": "a small dog", "1.png": "a large apple / a cat", "2.png": "a frog"}
    assert read_one_text(given, "--captions") == texts
    with pytest.raises(
        UserError, match=r"--captions: .*given.json, 0.png: its entry is \['a', 1\]; expected a caption"
    ):
        read_one_text(write(tmp_path, {"0.png": ["a", 1]}), "--captions")


@pytest.mark.slow
def test_the_miniature_is_confident_of_its_captions_of_the_examples(tmp_path, capsys):
    paths = [EXAMPLES / "combo-1.png", EXAMPLES / "test-3.png"]
    output = tmp_path / "c.json"
    assert main(["caption", *map(str, paths), "--output", str(output), "--confidence", "--device", "cpu"]) == 0
    assert "default --min-score" not in capsys.readouterr().err
    entries = json.loads(output.read_text())
    assert all(entry["confident"] for entry in entries.values())
    moved = dict(
        zip(entries, [entry["caption"] for entry in [*entries.values()][1:] + [*entries.values()][:1]], strict=True)
    )
    given = write(tmp_path, moved)
    scored = ["score", *map(str, paths), "--captions", given, "--output", str(tmp_path / "s.json"), "--device", "cpu"]
    assert main(scored) == 0
    scores = json.loads((tmp_path / "s.json").read_text())
    assert all(scores[name] < entry["score"] - 0.05 for name, entry in entries.items())
