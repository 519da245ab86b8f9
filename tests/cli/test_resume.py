"""`vlv caption --resume` goes on with its own results, and never takes over those of other images or another model."""

import json
import os
import shutil
import signal
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlv.captioning.inputs import Input, collect_images
from vlv.captioning.resume import ResumableResults, read_results
from vlv.cli.main import main
from vlv.errors import UserError
from vlv.pipelines import generate_captions

MODEL, SETTINGS = ("m", "1"), {"max_new_tokens": 4}


@pytest.fixture
def folder(tmp_path, images):
    """Three images."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name, image in zip("abc", images, strict=False):
        image.save(folder / f"{name}.png")
    return folder


def caption(model, output, *arguments) -> int:
    return main(["caption", *map(str, ("--model", model, "--output", output, "--device", "cpu", *arguments))])


def results_of(output, inputs, texts, model=MODEL, settings=SETTINGS, keeps_writing=False) -> ResumableResults:
    """A run that adds a text for each of some inputs, and stops."""
    results = ResumableResults(output, model, settings)
    results.add([replace(item, identity=item.identify()) for item in inputs], texts)
    if not keeps_writing:
        results.__exit__(None)
    return results


def resumed(output, inputs, model=MODEL, settings=SETTINGS) -> tuple[list[str], dict[str, str], list[str]]:
    """The names that a resumed run asks for, what it keeps, and its notes."""
    results = ResumableResults(output, model, settings)
    left = [item.name for item in results.resume(inputs)]
    with results:
        pass
    return left, json.loads(output.read_text()), results.notes()


def test_a_resumed_run_keeps_what_is_there_and_counts_it(model_folder, folder, tmp_path, capsys):
    output = tmp_path / "c.json"
    settings = ("--max-new-tokens", 6)
    (folder / "c.png").rename(tmp_path / "c.png")
    assert caption(model_folder, output, folder, *settings) == 0
    first = json.loads(output.read_text())
    (tmp_path / "c.png").rename(folder / "c.png")
    assert caption(model_folder, output, folder, "--resume", *settings) == 0
    assert "kept 2, captioned 1, failed 0" in capsys.readouterr().err
    assert caption(model_folder, tmp_path / "alone.json", folder, *settings) == 0
    assert json.loads(output.read_text()) == json.loads((tmp_path / "alone.json").read_text())
    assert list(json.loads(output.read_text()))[:2] == list(first)


def test_without_an_output_a_resumed_run_begins(model_folder, folder, tmp_path, capsys):
    assert caption(model_folder, tmp_path / "c.json", folder / "a.png", "--resume", "--max-new-tokens", 2) == 0
    assert "captioned 1, failed 0" in capsys.readouterr().err


def test_another_image_of_the_same_name_is_refused(folder, tmp_path, images, model_folder, capsys):
    output = tmp_path / "c.json"
    assert caption(model_folder, output, folder, "--max-new-tokens", 2) == 0
    other = tmp_path / "other"
    other.mkdir()
    images[5].save(other / "a.png")
    before = output.read_text()
    assert caption(model_folder, output, other, "--resume", "--max-new-tokens", 2) == 2
    said = capsys.readouterr().err
    assert f"another image under the name a.png: {folder / 'a.png'}" in said and output.read_text() == before


@pytest.mark.slow
def test_an_image_that_two_arguments_hold_is_captioned_once(folder, tmp_path, model_folder, capsys):
    output = tmp_path / "c.json"
    (folder / "sub").mkdir()
    (folder / "a.png").rename(folder / "sub" / "a.png")
    arguments = (folder / "sub", folder, "--max-new-tokens", 2)
    assert caption(model_folder, output, *arguments) == 0
    first = json.loads(output.read_text())
    assert sorted(first) == ["a.png", "b.png", "c.png"]
    assert caption(model_folder, output, *arguments, "--resume") == 0
    assert json.loads(output.read_text()) == first
    assert "kept 3, captioned 0, failed 0" in capsys.readouterr().err


def test_an_image_that_changes_while_it_is_captioned_is_captioned_again(
    folder, tmp_path, images, model_folder, monkeypatch, capsys
):
    from vlv.captioning import captioner as module

    def replace_images(*arguments, **settings):
        images[5].save(folder / "a.png")
        (folder / "b.png").unlink(missing_ok=True)
        return generate_captions(*arguments, **settings)

    monkeypatch.setattr(module, "generate_captions", replace_images)
    output = tmp_path / "c.json"
    assert caption(model_folder, output, folder, "--max-new-tokens", 2) == 0
    monkeypatch.undo()
    assert caption(model_folder, output, folder, "--max-new-tokens", 2, "--resume") == 0
    assert "kept 1, captioned 1, failed 0" in capsys.readouterr().err
    assert sorted(json.loads(output.read_text())) == ["a.png", "b.png", "c.png"]


def test_what_changes_captions_counts_as_another_model(folder, tmp_path, model_folder, stable_diffusion, capsys):
    output = tmp_path / "c.json"
    model = shutil.copytree(model_folder, tmp_path / "model")
    assert caption(model, output, folder, "--max-new-tokens", 2) == 0
    for name in ("training.json", "evaluation.json", "README.md", "unet/config.json"):
        (model / name).write_text("{}")
    assert caption(model, output, folder, "--max-new-tokens", 2, "--resume") == 0
    config = json.loads((model / "preprocessor_config.json").read_text())
    (model / "preprocessor_config.json").write_text(json.dumps(config | {"pre_crop_size": 16}))
    assert caption(model, output, folder, "--max-new-tokens", 2, "--resume") == 2
    assert f"other weights or settings of {model}" in capsys.readouterr().err


def test_two_runs_do_not_write_into_one_file(folder, tmp_path, model_folder, capsys):
    output = tmp_path / "c.json"
    first = results_of(output, collect_images([str(folder / "a.png")]), ["A"], keeps_writing=True)
    for option in ("--resume", "--overwrite"):
        assert caption(model_folder, output, folder, option) == 2
        assert f"another run writes into {output}" in capsys.readouterr().err
    first.__exit__(None)
    assert resumed(output, collect_images([str(folder)]))[0] == ["b.png", "c.png"]


def test_names_and_captions_with_other_line_separators_are_kept(tmp_path, images):
    images[0].save(tmp_path / "a\u2028b.png")
    output = tmp_path / "c.json"
    inputs = collect_images([str(tmp_path / "a\u2028b.png")])
    results_of(output, inputs, ["one\u2028two\u0085three"], model=("m\u2028", "1"))
    assert resumed(output, inputs, model=("m\u2028", "1"))[:2] == ([], {"a\u2028b.png": "one\u2028two\u0085three"})
    with pytest.raises(Exception, match="made by another model"):
        resumed(output, inputs, model=("n", "2"))


def test_a_result_never_takes_the_name_of_another_one(folder, tmp_path, images):
    output = tmp_path / "c.json"
    results_of(output, [Input("x.png", folder / "a.png"), Input("y.png", folder / "b.png")], ["A", "B"])
    with pytest.raises(Exception, match=r"another image under the name y\.png"):
        resumed(output, [Input("y.png", folder / "a.png")])


def test_another_model_is_refused(model_folder, folder, tmp_path, capsys):
    output = tmp_path / "c.json"
    assert caption(model_folder, output, folder / "a.png", "--max-new-tokens", 2) == 0
    trained = shutil.copytree(model_folder, tmp_path / "trained")
    assert caption(trained, output, folder, "--max-new-tokens", 2, "--resume") == 0  # the same weights elsewhere
    path = trained / "encoder" / "model.safetensors"
    weights = load_file(path)
    weights["model.query_tokens"] = weights["model.query_tokens"] + 1e-3
    save_file(weights, path, {"format": "pt"})
    assert caption(trained, output, folder, "--max-new-tokens", 2, "--resume") == 2
    assert f"made by another model, {model_folder}" in capsys.readouterr().err


def test_a_changed_image_is_captioned_again(folder, tmp_path, images):
    output = tmp_path / "c.json"
    results_of(output, collect_images([str(folder)]), ["A", "B", "C"])
    images[6].save(folder / "b.png")
    left, kept, _ = resumed(output, collect_images([str(folder)]))
    assert left == ["b.png"] and kept == {"a.png": "A", "c.png": "C"}


def test_an_image_is_recognised_by_its_content(folder, tmp_path):
    output = tmp_path / "c.json"
    results_of(output, collect_images([str(folder)]), ["A", "B", "C"])
    os.utime(folder / "a.png", (1, 1))
    moved = tmp_path / "moved"
    folder.rename(moved)
    left, kept, _ = resumed(output, collect_images([str(moved)]))
    assert left == [] and kept == {"a.png": "A", "b.png": "B", "c.png": "C"}
    assert resumed(output, collect_images([str(moved)]))[0] == []


def test_an_image_that_gets_another_name_keeps_its_result(folder, tmp_path, images):
    output = tmp_path / "c.json"
    results_of(output, collect_images([str(folder)]), ["A", "B", "C"])
    other = tmp_path / "other"
    other.mkdir()
    images[5].save(other / "a.png")
    left, kept, _ = resumed(output, collect_images([str(folder), str(other)]))
    assert left == [f"{other}/a.png"] and kept == {f"{folder}/a.png": "A", "b.png": "B", "c.png": "C"}


def test_results_of_other_images_stay(folder, tmp_path, images):
    output = tmp_path / "c.json"
    results_of(output, collect_images([str(folder)]), ["A", "B", "C"])
    images[5].save(tmp_path / "d.png")
    left, kept, _ = resumed(output, collect_images([str(tmp_path / "d.png")]))
    assert left == ["d.png"] and kept == {"a.png": "A", "b.png": "B", "c.png": "C"}


def test_other_settings_are_refused_or_said(folder, tmp_path):
    output = tmp_path / "c.json"
    inputs = collect_images([str(folder)])
    results_of(output, inputs[:2], ["A", "B"])
    other, written = SETTINGS | {"prompt": "as tags"}, output.read_bytes()
    refused = ResumableResults(output, MODEL, other)
    with pytest.raises(UserError, match=r"other settings \(prompt None, here as tags\); give .* or --resume-mixed"):
        refused.resume(inputs)
    refused.release()
    assert output.read_bytes() == written
    results = ResumableResults(output, MODEL, other, mixes=True)
    results.resume(inputs)
    (note,) = results.notes()
    assert note == "2 of the kept results were made with other settings (prompt None, here as tags)"
    results.add([replace(inputs[2], identity=inputs[2].identify())], ["C"])
    results.__exit__(None)
    again = ResumableResults(output, MODEL, SETTINGS, mixes=True)
    assert again.resume(inputs) == []
    (note,) = again.notes()
    assert note.startswith("1 of the kept results")
    again.release()
    limited = ResumableResults(output, MODEL, other | {"max_new_tokens": 9})
    with pytest.raises(UserError, match=r"\(prompt None, here as tags\)"):  # and not the limit
        limited.resume(inputs)
    limited.release()


def test_another_limit_of_tokens_is_said_and_not_refused(folder, tmp_path):
    output = tmp_path / "c.json"
    inputs = collect_images([str(folder)])
    results_of(output, inputs[:2], ["A", "B"])
    results = ResumableResults(output, MODEL, SETTINGS | {"max_new_tokens": 9})
    assert [item.name for item in results.resume(inputs)] == ["c.png"]
    assert results.notes() == ["2 of the kept results were made with other settings (max_new_tokens 4, here 9)"]
    results.release()


def test_a_result_without_a_record_is_made_again(folder, tmp_path, capsys, model_folder):
    output = tmp_path / "c.json"
    inputs = collect_images([str(folder)])
    results_of(output, inputs, ["A", "B", "C"])
    record = tmp_path / "c.resume.jsonl"
    lines = record.read_text().splitlines(keepends=True)
    record.write_text("".join(lines[:-1]) + lines[-1][:20])  # a last line that was cut off
    assert resumed(output, inputs)[:2] == (["c.png"], {"a.png": "A", "b.png": "B"})
    record.unlink()
    assert caption(model_folder, output, folder, "--resume") == 2
    assert "c.resume.jsonl cannot be read" in capsys.readouterr().err


def test_a_file_whose_last_write_was_cut_off_is_recovered(folder, tmp_path):
    output = tmp_path / "c.json"
    inputs = collect_images([str(folder)])
    results_of(output, inputs, ["A", "B", "C"])
    complete = output.read_bytes()
    for end in range(complete.index(b'"B"') + 4, len(complete) - 3):
        output.write_bytes(complete[:end])
        found = read_results(output, "--resume")
        assert list(found.items())[:2] == [("a.png", "A"), ("b.png", "B")] and len(found) <= 3
    assert resumed(output, inputs)[0] in ([], ["c.png"])


@pytest.mark.parametrize("content", ["[]", "text", '{"a": 1', ""])
def test_a_file_that_holds_no_results_is_refused_and_kept(content, model_folder, folder, tmp_path, capsys):
    (tmp_path / "c.json").write_text(content)
    assert caption(model_folder, tmp_path / "c.json", folder, "--resume") == 2
    assert "--resume: " in capsys.readouterr().err and (tmp_path / "c.json").read_text() == content


def test_embeddings_are_told_apart_by_their_values(tmp_path):
    z, output = tmp_path / "z.safetensors", tmp_path / "c.json"
    z.write_bytes(b"x")
    inputs = [Input(name, z, torch.full((2, 3), value)) for name, value in (("a", 1.0), ("b", 2.0))]
    results_of(output, inputs, ["A", "B"])
    z.write_bytes(b"xy")
    changed = [inputs[0], Input("b", z, torch.full((2, 3), 3.0))]
    assert resumed(output, changed)[:2] == (["b"], {"a": "A"})


def test_an_image_that_cannot_be_read_any_more_keeps_its_result(folder, tmp_path):
    output = tmp_path / "c.json"
    inputs = collect_images([str(folder)])
    results_of(output, inputs, ["A", "B", "C"])
    (folder / "a.png").unlink()
    assert resumed(output, inputs)[:2] == ([], {"a.png": "A", "b.png": "B", "c.png": "C"})


def test_a_terminated_run_keeps_its_results(model_folder, folder, tmp_path, monkeypatch):
    from vlv.cli import caption as module

    def terminate(self, *arguments):
        confirm(self, *arguments)
        signal.raise_signal(signal.SIGTERM)

    confirm = module.ResumableResults.confirm
    monkeypatch.setattr(module.ResumableResults, "confirm", terminate)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ending:
        caption(model_folder, tmp_path / "c.json", folder, "--batch-size", 1, "--max-new-tokens", 2)
    assert ending.value.code == 143 and list(json.loads((tmp_path / "c.json").read_text())) == ["a.png"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_pipe_is_read_once_and_captioned_again(folder, tmp_path, model_folder, capsys):
    pipe, output = tmp_path / "pipe", tmp_path / "c.json"
    os.mkfifo(pipe)
    for option in ("--overwrite", "--resume"):
        writer = threading.Thread(target=lambda: pipe.write_bytes((folder / "a.png").read_bytes()))
        writer.start()
        assert caption(model_folder, output, pipe, option, "--max-new-tokens", 2) == 0
        writer.join()
    assert "kept 0, captioned 1, failed 0" in capsys.readouterr().err
    assert list(json.loads(output.read_text())) == ["pipe"]


def test_of_two_runs_that_begin_together_one_is_refused(folder, tmp_path):
    output = tmp_path / "c.json"
    inputs = [replace(item, identity=item.identify()) for item in collect_images([str(folder)])]
    first, second = (ResumableResults(output, MODEL, SETTINGS) for _ in range(2))
    first.add(inputs[:1], ["A"])
    with pytest.raises(Exception, match="another run writes into"):
        second.add(inputs[1:2], ["B"])
    first.add(inputs[2:], ["C"])
    assert json.loads(output.read_text()) == {"a.png": "A", "c.png": "C"}
