"""`vlv caption` writes sidecars, lines and metadata, asks each image its own prompt, and says what it would do."""

import io
import json
import re
import shlex
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pyarrow
import pytest
from datasets import load_dataset
from PIL import Image
from pyarrow import parquet

from vlv import hub
from vlv.captioning.batches import read_batches, split_batch
from vlv.captioning.captioner import Captioner, CaptionSettings
from vlv.captioning.inputs import Input
from vlv.captioning.metadata import read_description
from vlv.captioning.output import Summary
from vlv.captioning.resume import ResumableResults, read_results
from vlv.captioning.texts import PromptTemplate
from vlv.cli import caption_io
from vlv.cli.main import main


@pytest.fixture
def folder(tmp_path, images):
    """Three images, one of them in a folder."""
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for name, image in zip(("a.png", "b.jpg", "sub/c.png"), images, strict=False):
        image.save(folder / name)
    return folder


def caption(model, *arguments, tokens=4) -> int:
    settings = ("--model", model, "--device", "cpu", "--max-new-tokens", tokens)
    return main(["caption", *map(str, (*arguments, *settings))])


def texts(folder) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in sorted(folder.rglob("*.txt"))}


@pytest.mark.slow
def test_sidecars_have_the_captions_of_the_json_and_are_skipped_by_the_next_run(
    model_folder, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert caption(model_folder, folder, "--output", "c.json", "--sidecar", "txt", "--trigger-word", "sks") == 0
    captions = json.loads((tmp_path / "c.json").read_text())
    assert all(text.startswith("sks, ") for text in captions.values())
    written = {"a.txt": "a.png", "b.txt": "b.jpg", "sub/c.txt": "sub/c.png"}
    assert texts(folder) == {sidecar: f"{captions[name]}\n" for sidecar, name in written.items()}
    assert "skipped 0, captioned 3, failed 0: c.json" in capsys.readouterr().err
    (folder / "a.txt").unlink()
    assert caption(model_folder, folder, "--sidecar", "txt", "--on-existing", "skip") == 0
    assert "skipped 2, captioned 1, failed 0: sidecars beside the images" in capsys.readouterr().err
    assert not (tmp_path / "captions.json").exists()
    assert texts(folder)["b.txt"].startswith("sks, ") and not texts(folder)["a.txt"].startswith("sks, ")
    monkeypatch.setattr(hub, "load_captioner", None)  # nothing is left to caption, so no model is loaded
    assert caption(model_folder, folder, "--sidecar", "txt", "--on-existing", "skip") == 0
    assert "skipped 3, captioned 0, failed 0" in capsys.readouterr().err
    assert caption(model_folder, folder, "--output", "c.json", "--trigger-word", "sks", "--resume") == 0
    assert "kept 3, captioned 0, failed 0: c.json" in capsys.readouterr().err
    assert json.loads((tmp_path / "c.json").read_text()) == captions


def test_existing_sidecars_are_refused_before_the_model_is_loaded(folder, capsys):
    (folder / "sub" / "c.txt").write_text("mine")
    assert caption("./no_model", folder, "--sidecar", "txt") == 2
    assert f"vlv: {folder}/sub/c.txt exists; pass --on-existing skip" in capsys.readouterr().err


@pytest.mark.parametrize("existing", ["error", "skip"])
def test_of_two_images_that_would_share_a_sidecar_the_second_fails_alone(
    model_folder, folder, images, existing, capsys
):
    images[3].save(folder / "a.webp")
    assert caption(model_folder, folder, "--sidecar", "txt", "--on-existing", existing) == 1
    said = capsys.readouterr().err
    shared = f"a.webp and a.png would share {folder}/a.txt; pass --sidecar-name full, which writes a.webp.txt"
    assert f"cannot caption a.webp: {shared}" in said and "captioned 3, failed 1" in said
    assert list(texts(folder)) == ["a.txt", "b.txt", "sub/c.txt"]


def test_the_lines_of_an_interrupted_run_are_not_replaced_without_a_word(folder, tmp_path, capsys):
    lines = tmp_path / "c.parquet.jsonl"
    lines.write_text('{"name": "a.png", "caption": "one"}\n')
    assert caption("./no_model", folder, "--output", tmp_path / "c.parquet") == 2
    assert f"{lines} exists; pass --resume to go on with it, --overwrite" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sidecar_that_appears_later_is_named_and_kept(model_folder, folder, monkeypatch, capsys):
    monkeypatch.setattr(caption_io, "LOOKAHEAD", 0)
    (folder / "a.txt").write_text("mine")
    (folder / "b.txt").mkdir()
    assert caption(model_folder, folder, "--sidecar", "txt", "--on-existing", "overwrite") == 1
    said = capsys.readouterr().err
    assert f"cannot write the caption of b.jpg: {folder}/b.txt: Is a directory" in said
    assert "captioned 2, failed 1" in said
    (folder / "sub" / "c.txt").unlink()
    assert caption(model_folder, folder, "--sidecar", "txt") == 1
    said = capsys.readouterr().err
    assert f"cannot caption a.png: {folder}/a.txt exists" in said and "captioned 1, failed 2" in said


def test_several_captions_are_in_numbered_sidecars_below_a_folder_of_their_own(model_folder, folder, tmp_path):
    out = tmp_path / "out"
    options = ("--sidecar", "txt", "--sidecar-dir", out, "--num-captions", 2)
    assert caption(model_folder, folder, *options) == 0
    assert list(texts(out)) == ["a.1.txt", "a.2.txt", "b.1.txt", "b.2.txt", "sub/c.1.txt", "sub/c.2.txt"]
    assert not texts(folder)


def test_a_full_disk_ends_a_run_that_writes_sidecars(model_folder, folder, capsys):
    from .test_writing import largest_file

    with largest_file(1):
        assert caption(model_folder, folder, "--sidecar", "txt") == 2
    said = capsys.readouterr().err
    assert "a.txt: File too large" in said and not texts(folder) and not list(folder.rglob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_resumed_run_goes_on_in_each_format(model_folder, folder, tmp_path, suffix, capsys):
    output = tmp_path / f"c{suffix}"
    (folder / "sub" / "c.png").rename(tmp_path / "c.png")
    assert caption(model_folder, folder, "--output", output) == 0
    assert caption(model_folder, folder, "--output", output) == 2
    assert f"{output} exists; pass --resume" in capsys.readouterr().err
    (tmp_path / "c.png").rename(folder / "sub" / "c.png")
    first = read_results(output, "--resume")
    assert caption(model_folder, folder, "--output", output, "--resume-mixed", "--prefix", "new: ") == 0
    said = capsys.readouterr().err
    assert "kept 2, captioned 1, failed 0" in said
    assert "2 of the kept results were made with other settings (prefix None, here new: )" in said
    results = read_results(output, "--resume")
    assert list(results) == ["a.png", "b.jpg", "sub/c.png"] and first.items() < results.items()
    assert results["sub/c.png"].startswith("new: ")


@pytest.mark.slow
def test_a_folder_of_images_becomes_a_data_set(model_folder, folder, tmp_path, capsys):
    assert caption(model_folder, folder, "--output", f"{folder}/") == 0
    data = load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    captions = read_results(folder / "metadata.jsonl", "--resume")
    assert data.column_names == ["image", "caption"] and list(data["caption"]) == list(captions.values())
    assert [image.size for image in data["image"]] == [Image.open(folder / name).size for name in captions]
    assert caption(model_folder, folder, "--output", f"{folder}/", "--resume") == 0
    assert "kept 3, captioned 0, failed 0" in capsys.readouterr().err


@pytest.mark.slow
def test_captions_in_metadata_are_read_by_the_next_run_which_keeps_them(model_folder, folder, tmp_path, capsys):
    output = tmp_path / "c.json"
    Image.new("RGB", (9, 9)).save(folder / "d.bmp")
    assert caption(model_folder, folder, "--metadata", "xmp", "--output", output) == 1
    said = capsys.readouterr().err
    assert "cannot caption d.bmp: dc:description of" in said and "captioned 3, failed 1" in said
    captions = json.loads(output.read_text())
    assert {name: read_description((folder / name).read_bytes()) for name in captions} == captions
    (folder / "d.bmp").unlink()
    assert caption(model_folder, folder, "--metadata", "xmp", "--output", output, "--resume") == 0
    assert "kept 3, skipped 0, captioned 0, failed 0" in capsys.readouterr().err
    assert caption(model_folder, folder, "--metadata", "xmp") == 2
    assert "a.png has a description; pass --on-existing" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("place", [("--sidecar", "txt"), ("--metadata", "xmp")])
def test_captions_that_a_killed_run_wrote_beside_images_are_kept(
    model_folder, folder, tmp_path, place, monkeypatch, capsys
):
    def end(self, inputs):
        raise KeyboardInterrupt

    output = tmp_path / "c.json"
    with monkeypatch.context() as patch:
        patch.setattr(ResumableResults, "confirm", end)
        assert caption(model_folder, folder, "--output", output, *place) != 0
    captions = json.loads(output.read_text())
    Image.new("RGB", (9, 9)).save(folder / "d.png")
    assert caption(model_folder, folder, "--output", output, *place, "--resume") == 0
    assert "kept 3, skipped 0, captioned 1, failed 0" in capsys.readouterr().err
    results = json.loads(output.read_text())
    assert captions.items() < results.items() and list(results)[-1] == "d.png"
    if "txt" in place:
        Image.new("RGB", (9, 9)).save(folder / "d.webp")
        assert caption(model_folder, folder, "--output", output, *place, "--resume") == 1
        said = capsys.readouterr().err
        assert "d.webp and d.png would share" in said and "kept 4, skipped 0, captioned 0, failed 1" in said


def test_csv_goes_on_with_as_many_captions_of_each_image(model_folder, folder, tmp_path, capsys):
    (tmp_path / "c.csv").write_text("name,caption_1,caption_2\na.png,one,two\n")
    (tmp_path / "c.csv.resume.jsonl").write_text("")
    assert caption(model_folder, folder, "--output", tmp_path / "c.csv", "--num-captions", 3, "--resume") == 2
    assert "has columns of 2 captions of each image, and this run writes 3; pass" in capsys.readouterr().err


def test_a_result_whose_sidecar_cannot_be_written_is_in_the_output(model_folder, folder, tmp_path):
    output = tmp_path / "c.json"
    (folder / "b.txt").mkdir()
    options = ("--sidecar", "txt", "--on-existing", "overwrite", "--output", output)
    assert caption(model_folder, folder, *options) == 1
    assert list(json.loads(output.read_text())) == ["a.png", "b.jpg", "sub/c.png"]


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(folder, model_folder, monkeypatch, capsys):
    monkeypatch.setattr(caption_io, "SHOWN", 1)
    (folder / "sub" / "c.txt").write_text("mine")
    before = sorted(folder.rglob("*"))
    options = ("--sidecar", "txt", "--on-existing", "skip", "--dry-run", "--output", folder / "c.csv")
    monkeypatch.setattr(hub, "load_captioner", lambda *args, **kwargs: pytest.fail("the model is loaded"))
    assert caption(model_folder, folder, *options) == 0
    shown = capsys.readouterr()
    assert shown.out == f"a.png -> {folder}/c.csv, {folder}/a.txt\n... and 1 more\n"
    assert "dry run: would skip 1, caption 2, fail 0; nothing is written" in shown.err
    assert sorted(folder.rglob("*")) == before


def test_the_commands_of_the_docs_say_what_they_would_do(folder, images, tmp_path, monkeypatch, capsys):
    """As dry runs, with a local data set in place of that of the Hub."""
    page = (Path(__file__).parents[2] / "docs" / "captioning.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    lines = [shlex.split(line.rpartition("| ")[2], comments=True) for block in blocks for line in block.splitlines()]
    commands = [words for words in lines if words[:2] == ["vlv", "caption"]]
    assert len(commands) >= 9
    monkeypatch.chdir(tmp_path)
    folder.rename("photos")
    for name in ("data", "shards"):
        Path(name).mkdir()
    with tarfile.open("shards/0.tar", "w") as archive:
        archive.add("photos/a.png", "a.png")
    parquet.write_table(pyarrow.table({"image": [Path("photos/a.png").read_bytes()]}), "data/test-0.parquet")
    for _, *words in commands:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"photos/a.png\n")))
        assert main([word.replace("org/name", "data") for word in words] + ["--dry-run"]) == 0, words
        assert "dry run: would" in capsys.readouterr().err


def test_a_dry_run_knows_what_a_resumed_run_keeps(folder, model_folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "c.jsonl"
    assert caption(model_folder, folder / "a.png", "--output", output) == 0
    content = {path: path.read_bytes() for path in tmp_path.glob("c.*")}
    resolve, needed = hub.resolve, []

    def recorded(*arguments, allow_patterns, **options):
        needed.extend(allow_patterns)
        return resolve(*arguments, allow_patterns=allow_patterns, **options)

    monkeypatch.setattr(hub, "resolve", recorded)
    for _ in range(2):
        assert caption(model_folder, folder, "--output", output, "--resume", "--dry-run") == 0
        shown = capsys.readouterr()
        assert "would keep 1, caption 2, fail 0" in shown.err and shown.out.count(" -> ") == 2
    assert {path: path.read_bytes() for path in tmp_path.glob("c.*")} == content
    assert set(needed) == {"config.json"}  # no weights are downloaded


def test_prompts_of_different_lengths_give_the_captions_that_each_gives_alone(model_folder, folder, image_processor):
    model, processor = hub.load_captioner(model_folder)
    (folder / "a.txt").write_text("a small dog on the left")
    (folder / "b.txt").write_text("a large")
    items = [Input(name, folder / name) for name in ("a.png", "b.jpg", "sub/c.png")]
    (batch,) = read_batches(items, image_processor, 8, Summary(3))
    template = PromptTemplate("{tags}", caption_io.read_sidecar)
    captioner = Captioner(model, processor, CaptionSettings(max_new_tokens=8), template)
    together = captioner.caption(batch)
    alone = [captioner.caption(row)[0] for row in split_batch(batch)]
    without = Captioner(model, processor, CaptionSettings(max_new_tokens=8)).caption(batch)
    assert together == alone and together[:2] != without[:2] and together[2] == without[2]
    shortened = replace(captioner, cut=lambda text: text[:5])
    assert shortened.caption(batch) == [[text[:5] for text in own] for own in together]


def test_an_image_whose_own_prompt_is_too_long_fails_alone(model_folder, folder, tmp_path, capsys):
    (folder / "b.txt").write_text("dog " * 120)
    output = tmp_path / "c.json"
    assert caption(model_folder, folder, "--output", output, "--prompt", "a {tags}") == 1
    assert "cannot caption b.jpg: its prompt: the image and the text" in capsys.readouterr().err
    assert list(json.loads(output.read_text())) == ["a.png", "sub/c.png"]


def test_a_length_needs_an_instruction_of_the_model(model_folder, folder, tmp_path, capsys):
    assert caption(model_folder, folder, "--output", tmp_path / "c.json", "--length", "short") == 2
    assert "records none" in capsys.readouterr().err


def test_a_list_on_standard_input_is_captioned(model_folder, folder, tmp_path, monkeypatch, capsys):
    def caption_list(*names, options=()) -> int:
        lines = "".join(f"{folder}/{name}\n" for name in names).encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
        return caption(model_folder, "-", "--output", tmp_path / "c.jsonl", *options)

    assert caption_list("a.png", "gone.png") == 1
    assert list(read_results(tmp_path / "c.jsonl", "--resume")) == [f"{folder}/a.png"]
    assert f"cannot read {folder}/gone.png: {folder}/gone.png does not exist" in capsys.readouterr().err
    assert caption_list("a.png", "b.jpg", options=["--resume"]) == 0
    assert "kept 1, captioned 1, failed 0" in capsys.readouterr().err


def test_a_stage_1_model_is_said_to_write_no_captions(stage1_checkpoint, folder, tmp_path, capsys):
    assert caption(stage1_checkpoint, folder, "--output", tmp_path / "c.json") == 2
    said = capsys.readouterr().err
    assert f"{stage1_checkpoint} is a stage-1 model, which writes no captions; train stage 2 from it" in said
    assert "ValueError" not in said and not (tmp_path / "c.json").exists()


def test_a_text_file_of_paths_is_named_and_its_run_does_not_block_the_next(model_folder, folder, tmp_path, capsys):
    (folder / "list.txt").write_text(f"{folder}/a.png\n")
    output = tmp_path / "c.json"
    assert caption(model_folder, folder / "list.txt", "--output", output) == 1
    said = capsys.readouterr().err
    assert f"read from standard input: vlv caption - < {folder}/list.txt (or from a .jsonl, .json, .csv" in said
    assert caption(model_folder, folder / "a.png", "--output", output) == 0
    done = output.read_text()
    assert caption(model_folder, folder / "b.jpg", "--output", output) == 2
    assert "c.json exists; pass --resume" in capsys.readouterr().err and output.read_text() == done
    other = tmp_path / "d.json"  # of no run
    other.write_text("{}")
    assert caption("./no_model", folder / "a.png", "--output", other) == 2
    assert "d.json exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.png", "--dataset", "org/name"], "and not several of them"),
        (["x.png", "--split", "test"], "--split needs --dataset"),
        (["x.png", "--image-column", "jpg"], "--image-column needs --dataset, or parquet or list files"),
        (["x.png", "--on-existing", "skip"], "--on-existing needs --sidecar or --metadata"),
        (["x.png", "--sidecar-dir", "out"], "--sidecar-dir needs --sidecar"),
        (["x.png", "--sidecar", "txt", "--separator", ""], "--separator needs --on-existing append or prepend"),
        (["x.png", "--sidecar", "txt", "--resume"], "--resume needs --output (or pass --on-existing skip)"),
        (
            ["--dataset", "org/name", "--streaming", "--resume"],
            "--resume would keep all rows of --streaming in memory",
        ),
        (["x.png", "--metadata", "xmp", "--num-captions", "2"], "--metadata has one caption of an image"),
        (["--dataset", "org/name", "--sidecar", "txt"], "--sidecar with --dataset needs --sidecar-dir DIR"),
        (["x.png", "--prompt", "{nme}"], "--prompt has {nme}; a prompt may say {name}"),
        (["x.png", "--sidecar", "txt", "--sidecar-dir", "x.png/out"], "x.png is not a folder"),
        (["--embeddings", "z", "--sidecar", "txt"], "--sidecar is for images"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_the_model_is_loaded(
    arguments, message, tmp_path, monkeypatch, capsys
):
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    monkeypatch.chdir(tmp_path)
    assert caption("./no_model", *arguments) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_info_lists_the_formats_of_images(capsys):
    assert main(["info", "--formats"]) == 0
    lines = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert ".png" in lines["PNG"].split() and ".jpg" in lines["JPEG"].split() and "MPEG" not in lines
    assert main(["info", "--formats", "--json"]) == 0
    assert ".webp" in json.loads(capsys.readouterr().out)["WEBP"]
    for arguments in (["info"], ["info", "x", "--formats"]):
        assert main(arguments) == 2
        assert "give DIR_OR_REPO or --formats, and not both" in capsys.readouterr().err
