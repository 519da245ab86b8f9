"""The text of captions is edited before it is written, and prompts say something of their image."""

import pytest

from vlv.captioning.inputs import Input
from vlv.captioning.sidecars import read_sidecar
from vlv.captioning.texts import (
    CaptionEditor,
    PromptTemplate,
    end_of_first_pass,
    instruction_of_length,
    prompt_fields,
)
from vlv.errors import UserError


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("a dog on a mat " * 4, "a dog on a mat"),
        ("A red house. The sky is blue. The sky is blue. The sky is blue.", "A red house. The sky is blue."),
        ("it is very " + "very " * 8 + "good", "it is very"),
        ("a cat, and a dog, and a dog, and a dog, and", "a cat, and a dog"),
    ],
)
def test_a_loop_is_cut_after_its_first_pass(text, cut):
    editor = CaptionEditor(loop_guard=True)
    assert editor.edit(text) == cut
    assert editor.notes() == ["note: 1 captions repeat themselves over and over, cut after the first pass"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "dog, dog, dog, dog, meadow",  # tags count what they name
        "a small dog on the left, a small dog on the right, and a small dog in the middle",
        "the sky is blue. the sky is blue.",
    ],
)
def test_a_text_that_is_not_a_loop_stays(text):
    editor = CaptionEditor(loop_guard=True)
    assert end_of_first_pass(text) is None and editor.edit(text) == text and editor.notes() == []


def test_a_loop_is_counted_and_left_where_it_is_not_to_be_cut():
    editor = CaptionEditor()
    loop = "a dog runs " * 3
    assert editor.edit([loop, "a cat"]) == [loop, "a cat"]
    (note,) = editor.notes()
    assert note.startswith("note: 1 captions repeat") and "--loop-guard" in note


def test_prefix_suffix_and_trigger_word_are_put_into_every_form_of_a_result():
    editor = CaptionEditor(prefix="<", suffix=">", trigger_word="sks")
    assert editor.edit("a dog") == "<sks, a dog>"
    assert editor.edit(["a sks dog", "asks a dog", ""]) == ["<a sks dog>", "<sks, asks a dog>", "<sks>"]
    assert editor.edit({"caption": "a dog", "score": 1.0}) == {"caption": "<sks, a dog>", "score": 1.0}
    assert editor.recorded() == {"prefix": "<", "suffix": ">", "trigger_word": "sks"}


def test_a_prompt_says_what_its_image_is_called_and_what_lies_beside_it(tmp_path):
    folder = tmp_path / "Paris 2024"
    folder.mkdir()
    item = Input("x", folder / "tower.v2.png")
    template = PromptTemplate("{name} in {folder}: {tags} / {caption}", read_sidecar)
    assert template.render(item) == "tower.v2 in Paris 2024:  /"
    (folder / "tower.v2.txt").write_text("iron, sky\n")
    assert template.render(item) == "tower.v2 in Paris 2024: iron, sky / iron, sky"
    (folder / "tower.v2.png.caption").write_text("a tower")
    assert template.render(item) == "tower.v2 in Paris 2024: iron, sky / a tower"
    (folder / "tower.v2.txt").unlink()
    (folder / "tower.v2.json").write_text('{"caption": "other", "tags": ["steel", "cloud"]}')
    assert template.render(item) == "tower.v2 in Paris 2024: steel, cloud / a tower"


def test_a_prompt_of_a_member_says_its_folder_in_the_archive(tmp_path):
    item = Input("a.tar/cats/tom.jpg", tmp_path / "a.tar", member="cats/tom.jpg")
    assert PromptTemplate("{folder} {name} {caption}", read_sidecar).render(item) == "cats tom"


def test_a_prompt_that_cannot_be_made_is_named(tmp_path, folder_of_nobody):
    with pytest.raises(ValueError, match="is not UTF-8"):
        PromptTemplate("{name}", read_sidecar).render(Input("x", tmp_path / "caf\udce9.png"))
    (folder_of_nobody / "a.tags").write_text("iron")
    (folder_of_nobody / "a.tags").chmod(0)
    with pytest.raises(ValueError, match=r"a\.tags cannot be read: Permission denied"):
        PromptTemplate("{tags}", read_sidecar).render(Input("a", folder_of_nobody / "a.png"))


def test_an_unknown_field_of_a_prompt_is_refused():
    assert prompt_fields("as tags") == [] and prompt_fields("{name} {tags}") == ["name", "tags"]
    with pytest.raises(UserError, match=r"--prompt has \{nane\}; a prompt may say \{name\}, \{folder\}"):
        prompt_fields("{nane}")


def test_a_length_is_the_one_instruction_that_asks_for_it():
    instructions = ["as tags", "briefly", "in detail", "a long caption"]
    assert instruction_of_length("short", instructions, "m") == "briefly"
    with pytest.raises(UserError, match="--length long may mean 'in detail', 'a long caption' to m"):
        instruction_of_length("long", instructions, "m")
    with pytest.raises(UserError, match=r"--length medium needs a model .* m records 'as tags'"):
        instruction_of_length("medium", instructions, "m")
    with pytest.raises(UserError, match="m records none"):
        instruction_of_length("short", None, "m")
