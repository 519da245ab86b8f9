"""`vlv caption --prompt`: an instruction between the caption embeddings and the caption."""

import json
import shutil

import pytest

from vlv import hub
from vlv.cli.main import main
from vlv.pipelines import generate_captions

KNOWN, OTHER = "a small dog", "on the right"  # words that the tokenizer of the tests knows


@pytest.fixture(scope="module")
def instructed_folder(model_folder, tmp_path_factory):
    """A captioner that names an instruction."""
    folder = shutil.copytree(model_folder, tmp_path_factory.mktemp("instructed") / "vlv")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"instructions": [KNOWN]}))
    return folder


@pytest.fixture
def image(tmp_path, images):
    images[0].save(tmp_path / "image.png")
    return tmp_path / "image.png"


def caption(model, output, *arguments) -> int:
    settings = ("--model", model, "--output", output, "--device", "cpu", "--max-new-tokens", 6)
    return main(["caption", *map(str, (*settings, *arguments))])


def test_the_prompt_stands_before_the_captions_of_images_and_of_embeddings(instructed_folder, image, tmp_path, capsys):
    model, processor = hub.load_captioner(instructed_folder)
    pixel_values = processor(images=image).pixel_values
    settings = {"pixel_values": pixel_values, "max_new_tokens": 6}
    plain, prompted = (generate_captions(model, processor, text=text, **settings)[0] for text in (None, KNOWN))
    assert plain != prompted
    assert caption(instructed_folder, tmp_path / "c.json", image, "--prompt", KNOWN) == 0
    assert json.loads((tmp_path / "c.json").read_text()) == {"image.png": prompted}
    z = str(tmp_path / "z.safetensors")
    assert main(["encode", str(image), "--model", str(instructed_folder), "--output", z, "--device", "cpu"]) == 0
    assert caption(instructed_folder, tmp_path / "z.json", "--embeddings", z, "--prompt", KNOWN) == 0
    assert list(json.loads((tmp_path / "z.json").read_text()).values()) == [prompted]
    assert "note:" not in capsys.readouterr().err


def test_a_resumed_run_mixes_captions_of_another_prompt_only_where_that_is_said(
    instructed_folder, image, tmp_path, capsys
):
    output = tmp_path / "c.json"
    assert caption(instructed_folder, output, image) == 0
    assert caption(instructed_folder, output, image, "--resume", "--prompt", KNOWN) == 2
    assert f"made with other settings (prompt None, here {KNOWN}); give those of then" in capsys.readouterr().err
    assert caption(instructed_folder, output, image, "--resume-mixed", "--prompt", KNOWN) == 0
    assert (
        f"1 of the kept results were made with other settings (prompt None, here {KNOWN})" in capsys.readouterr().err
    )


@pytest.mark.parametrize("records", [True, False])
def test_a_prompt_that_the_model_was_not_trained_with_gives_a_note(
    records, instructed_folder, model_folder, image, tmp_path, capsys
):
    model = instructed_folder if records else model_folder
    assert caption(model, tmp_path / "c.json", image, "--prompt", OTHER) == 0
    said = f"was trained to follow '{KNOWN}'" if records else "records no instructions"
    assert f"note: {model} {said}; it reads '{OTHER}' as the beginning of captions" in capsys.readouterr().err


def test_a_prompt_that_the_language_model_cannot_read_is_refused(instructed_folder, image, tmp_path, capsys):
    assert caption(instructed_folder, tmp_path / "c.json", image, "--prompt", "dog " * 120) == 2
    assert "--prompt: the image and the text before the caption have 128 tokens" in capsys.readouterr().err
    assert not (tmp_path / "c.json").exists()


@pytest.mark.slow
def test_a_length_is_the_instruction_of_the_model_that_asks_for_it(model_folder, image, tmp_path, capsys):
    folder = shutil.copytree(model_folder, tmp_path / "vlv")
    config = json.loads((folder / "config.json").read_text())
    short = "a dog in brief"
    (folder / "config.json").write_text(json.dumps(config | {"instructions": [KNOWN, short]}))
    assert caption(folder, tmp_path / "length.json", image, "--length", "short") == 0
    assert "note:" not in capsys.readouterr().err
    assert caption(folder, tmp_path / "prompt.json", image, "--prompt", short) == 0
    assert (tmp_path / "length.json").read_text() == (tmp_path / "prompt.json").read_text()
    assert json.loads((tmp_path / "length.resume.jsonl").read_text().split("\n")[0])["settings"]["prompt"] == short


def test_a_model_without_a_language_model_takes_no_prompt(stage1_checkpoint, image, tmp_path, capsys):
    assert caption(stage1_checkpoint, tmp_path / "c.json", image, "--prompt", KNOWN) == 2
    assert f"cannot load {stage1_checkpoint}: " in capsys.readouterr().err


def test_info_lists_the_instructions(instructed_folder, model_folder, capsys):
    assert main(["info", str(instructed_folder)]) == 0
    assert f"instructions: {KNOWN}\n" in capsys.readouterr().out
    assert main(["info", str(model_folder)]) == 0
    assert "instructions" not in capsys.readouterr().out
