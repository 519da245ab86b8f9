"""Sidecars: their names, and what happens to files that are there."""

import json
import os
from contextlib import nullcontext

import pytest

from vlv.captioning.inputs import Input
from vlv.captioning.metadata import XmpCaptions
from vlv.captioning.output import Summary
from vlv.captioning.sidecars import ExistingCaption, Sidecars, UnsupportedFile
from vlv.errors import UserError


def inputs(folder, *names) -> list[Input]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"an image")
    return [Input(name, folder / name) for name in names]


def test_a_sidecar_lies_beside_its_image_or_in_a_folder_of_its_own(tmp_path):
    (item,) = inputs(tmp_path, "sub/a.b.png")
    assert Sidecars("txt").paths(item) == [tmp_path / "sub" / "a.b.txt"]
    assert Sidecars("caption", full_names=True).paths(item) == [tmp_path / "sub" / "a.b.png.caption"]
    assert Sidecars("txt", tmp_path / "out").paths(item) == [tmp_path / "out" / "sub" / "a.b.txt"]
    outside = Input("../x.png", tmp_path / "x.png")
    assert Sidecars("txt", tmp_path / "out").paths(outside) == [tmp_path / "out" / "_" / "x.txt"]
    absolute = Input(str(tmp_path / "x.png"), tmp_path / "x.png")
    (path,) = Sidecars("txt", tmp_path / "out").paths(absolute)
    assert path.is_relative_to(tmp_path / "out") and path.name == "x.txt"


def test_several_captions_are_in_numbered_files_and_in_json_a_list(tmp_path):
    (item,) = inputs(tmp_path, "a.png")
    Sidecars("txt", count=2).write(item, ["one", "two"])
    assert [(tmp_path / f"a.{n}.txt").read_text() for n in (1, 2)] == ["one\n", "two\n"]
    Sidecars("json", count=2).write(item, ["one", "two"])
    assert json.loads((tmp_path / "a.json").read_text()) == {"caption": ["one", "two"]}


def test_images_with_one_stem_do_not_share_a_sidecar(tmp_path):
    items = inputs(tmp_path, "a.jpg", "a.png", "b.png")
    sidecars = Sidecars("txt")
    assert sidecars.wants(items[0]) and sidecars.wants(items[2])
    with pytest.raises(UserError, match=r"a\.png and a\.jpg would share .*a\.txt; pass --sidecar-name .* a\.png\.txt"):
        sidecars.wants(items[1])
    full = Sidecars("txt", full_names=True)
    assert [full.wants(item) for item in items] == [True] * 3


def test_an_existing_sidecar_is_refused_unless_something_else_is_said(tmp_path):
    (item,) = inputs(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("mine")
    with pytest.raises(ExistingCaption, match=r"a\.txt exists; pass --on-existing skip"):
        Sidecars("txt").wants(item)
    assert not Sidecars("txt", on_existing="skip").wants(item)
    assert Sidecars("txt", on_existing="overwrite").wants(item)
    assert Sidecars("txt", count=2, on_existing="skip").wants(item)  # its files are a.1.txt and a.2.txt


def test_a_link_in_place_of_a_sidecar_is_one_even_if_it_leads_nowhere(tmp_path):
    (item,) = inputs(tmp_path, "a.png")
    (tmp_path / "a.txt").symlink_to("gone")
    with pytest.raises(ExistingCaption):
        Sidecars("txt").wants(item)


@pytest.mark.parametrize(
    ("on_existing", "content"),
    [("overwrite", "new\n"), ("append", "old, new\n"), ("prepend", "new, old\n")],
)
def test_what_exists_is_replaced_or_kept_and_a_second_run_changes_nothing(tmp_path, on_existing, content):
    (item,) = inputs(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfold\r\n")
    for _ in range(2):
        Sidecars("txt", on_existing=on_existing).write(item, "new")
        assert (tmp_path / "a.txt").read_text() == content


@pytest.mark.parametrize(("on_existing", "text"), [("append", "old, new"), ("prepend", "new, old")])
@pytest.mark.parametrize("existing", ["old", ""])
def test_white_space_around_captions_that_are_joined_does_not_add_them_again(tmp_path, on_existing, text, existing):
    """`--prefix` and `--suffix` bring it."""
    (item,) = inputs(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text(existing)
    (tmp_path / "a.json").write_text(json.dumps({"caption": existing}))
    for _ in range(3):
        for kind in ("txt", "json"):
            Sidecars(kind, on_existing=on_existing).write(item, " new ")
        assert (tmp_path / "a.txt").read_text() == (f"{text}\n" if existing else "new\n")
        assert json.loads((tmp_path / "a.json").read_text())["caption"] == (text if existing else "new")


def test_a_json_sidecar_keeps_its_other_values(tmp_path):
    (item,) = inputs(tmp_path, "a.png")
    path = tmp_path / "a.json"
    path.write_text('{"tags": ["x"], "caption": "old"}')
    Sidecars("json", on_existing="append", separator=" | ").write(item, {"caption": "new", "score": 0.5})
    assert json.loads(path.read_text()) == {"tags": ["x"], "caption": "old | new", "score": 0.5}
    Sidecars("json", on_existing="append").write(item, ["new", "second"])
    assert json.loads(path.read_text())["caption"] == ["old | new", "new", "second"]
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"a\.json cannot be read as JSON: it is not an object"):
        Sidecars("json", on_existing="append").write(item, "new")
    Sidecars("json", on_existing="overwrite").write(item, "new")
    assert json.loads(path.read_text()) == {"caption": "new"}


def test_a_sidecar_that_appears_while_its_image_is_captioned_is_kept(tmp_path):
    (item,) = inputs(tmp_path, "a.png")
    for kind, on_existing in (("txt", "error"), ("json", "error"), ("txt", "skip")):
        sidecars, path = Sidecars(kind, on_existing=on_existing), tmp_path / f"a.{kind}"
        path.unlink(missing_ok=True)
        assert sidecars.wants(item)
        path.write_text('{"caption": "mine"}')
        with pytest.raises(FileExistsError) if on_existing == "error" else nullcontext():
            sidecars.write(item, "new")
        assert path.read_text() == '{"caption": "mine"}'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.png", "a.txt"]


def test_of_several_sidecars_skip_writes_those_that_are_missing(tmp_path):
    (item,) = inputs(tmp_path, "a.png")
    (tmp_path / "a.1.txt").write_text("mine")
    Sidecars("txt", count=2, on_existing="skip").write(item, ["one", "two"])
    assert [(tmp_path / f"a.{n}.txt").read_text() for n in (1, 2)] == ["mine", "two\n"]


def test_the_score_of_another_caption_goes_and_an_empty_caption_adds_nothing(tmp_path):
    (item,) = inputs(tmp_path, "a.png")
    path = tmp_path / "a.json"
    path.write_text('{"caption": "old", "score": 0.5, "confident": true}')
    for _ in range(2):
        Sidecars("json", on_existing="append").write(item, "")
    assert json.loads(path.read_text()) == {"caption": "old"}


def test_a_sidecar_that_is_not_text_is_named_and_kept(tmp_path):
    (item,) = inputs(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8"):
        Sidecars("txt", on_existing="append").write(item, "new")
    assert (tmp_path / "a.txt").read_bytes() == b"caf\xe9"


def test_skipped_images_are_not_read_and_are_counted(tmp_path):
    items = inputs(tmp_path, "a.png", "b.png")
    (tmp_path / "a.txt").write_text("mine")
    (tmp_path / "a.png").unlink()
    os.mkfifo(tmp_path / "a.png")  # opening it would wait for a writer
    sidecars, summary = Sidecars("txt", on_existing="skip"), Summary(2)
    assert [item.name for item in sidecars.select(items, summary)] == ["b.png"]
    assert sidecars.skipped == 1 and not summary.failed


def test_a_folder_that_cannot_be_written_into_is_named_before_its_images_are_captioned(folder_of_nobody):
    (item,) = inputs(folder_of_nobody, "a.png")
    folder_of_nobody.chmod(0o500)
    for files in (Sidecars("txt"), XmpCaptions()):
        (item.path).chmod(0o600)
        item.path.write_bytes(b"\xff\xd8\xff")
        with pytest.raises(UserError, match="no permission to write into"):
            files.wants(item)


def test_a_format_without_metadata_is_named_before_the_image_is_captioned(tmp_path):
    (item,) = inputs(tmp_path, "a.gif")
    with pytest.raises(UnsupportedFile, match=r"a\.gif: metadata can be written into JPEG, PNG and WebP files"):
        XmpCaptions("overwrite").wants(item)


def test_an_image_inside_another_file_needs_a_folder_for_its_sidecar(tmp_path):
    member = Input("s.tar/0/a.png", tmp_path / "s.tar", member="0/a.png")
    with pytest.raises(UserError, match=r"s\.tar/0/a\.png is not a file .* pass --sidecar-dir"):
        Sidecars("txt").wants(member)
    assert Sidecars("txt", tmp_path / "out").paths(member) == [tmp_path / "out" / "s.tar" / "0" / "a.txt"]
