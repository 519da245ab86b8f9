"""The model card: what it says, and what a push changes in a card that exists."""

import json
import shutil
from importlib import import_module

import pytest
import yaml

from vlv import hub as vlv_hub
from vlv.cli.main import main
from vlv.hub import Card

REPO = "org/vlv"
RESULTS = {"captions": {"object_f1": 0.25}}


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---")[1])


def test_the_card_of_a_captioner_names_its_task_and_tags(model, tmp_path):
    card = Card(RESULTS, "vlv evaluate y", "mit")
    text = (vlv_hub.write_repository(model, tmp_path / "out", repo=REPO, card=card) / "README.md").read_text()
    front = front_matter(text)
    assert front["pipeline_tag"] == "image-text-to-text" and front["library_name"] == "transformers"
    assert front["license"] == "mit" and front["base_model"] == ["florence-community/Florence-2-base"]
    tags = {"vlv", "diffusion", "custom_code", "image-captioning", "image-to-text", "conversational"}
    assert set(front["tags"]) == tags
    assert front["model-index"][0]["results"][0]["task"]["type"] == "image-text-to-text"
    assert text.index('pipeline("image-to-text", ') < text.index('pipeline("image-text-to-text", ')


@pytest.mark.parametrize(("reconstructs", "task"), [(True, "image-to-image"), (False, "image-feature-extraction")])
def test_the_card_of_a_stage_1_model_names_its_task(reconstructs, task, stage1_checkpoint, stable_diffusion, tmp_path):
    diffusion_model = stable_diffusion if reconstructs else None
    folder = vlv_hub.write_repository(stage1_checkpoint, tmp_path / "out", diffusion_model=diffusion_model)
    front = front_matter((folder / "README.md").read_text())
    assert front["pipeline_tag"] == task and set(front["tags"]) == {"vlv", "diffusion", "custom_code"}


@pytest.mark.slow
def test_an_existing_card_changes_only_where_it_is_told_to(model, tmp_path):
    folder = vlv_hub.write_repository(model, tmp_path / "first", repo=REPO)
    card = folder / "README.md"
    text = card.read_text().replace("## Limits and risks", "## Own words\n\nStay.\n\n## Limits and risks")
    card.write_text(text)
    assert (vlv_hub.write_repository(folder, tmp_path / "same", repo=REPO) / "README.md").read_text() == text
    new = Card(RESULTS, "vlv evaluate y", "mit")
    changed = (vlv_hub.write_repository(folder, tmp_path / "new", repo=REPO, card=new) / "README.md").read_text()
    front, before = front_matter(changed), front_matter(text)
    assert front["license"] == "mit" and front["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.25
    assert {**front, "license": 0, "model-index": 0} == {**before, "license": 0, "model-index": 0}
    assert "Printed by `vlv evaluate y`.\n\n| subject |" in changed and "| captions | object_f1 | 0.25 |" in changed
    assert "No results were passed" in text and "No results were passed" not in changed
    head, _, tail = changed.split("---", 2)[2].partition("## Results")
    assert text.split("---", 2)[2].startswith(head)
    assert text.endswith(tail[tail.index("## Own words") :])


@pytest.mark.slow
def test_a_card_that_was_edited_on_the_hub_is_kept_with_a_warning(model, hub_server, caplog):
    hub, _ = hub_server

    def push(*more) -> str:
        caplog.clear()
        assert main(["push", str(model), REPO, "--token", "hf_org", *more]) == 0
        return hub.repos[REPO].at("main").files["README.md"].decode()

    first = push()
    second = push("--license", "mit")  # not edited since: written anew
    assert "license: mit" in second and "edited on the Hub" not in caplog.text
    edited = second.replace("# vlv\n", "# vlv\n\nOur own words.\n")
    assert edited != second
    hub.repos[REPO].commit("main", "edit", {**hub.repos[REPO].at("main").files, "README.md": edited.encode()})
    assert push() == edited
    assert "edited on the Hub and is kept; replace_card" in caplog.text
    third = push("--license", "apache-2.0")
    assert "edited on the Hub and is kept, with the new license; replace_card" in caplog.text
    assert "Our own words." in third and "license: apache-2.0" in third
    assert push("--replace-card") == first and "edited on the Hub" not in caplog.text


def test_write_access_is_checked_before_the_model_is_exported(model, hub_server, monkeypatch, capsys):
    def export(*arguments, **keywords):
        pytest.fail("exported before write access was checked")

    monkeypatch.setattr(import_module("vlv.hub.push"), "export", export)
    assert main(["push", str(model), REPO, "--token", "hf_other"]) == 2
    assert "may not write" in capsys.readouterr().err
    with pytest.raises(vlv_hub.UploadError, match="may not write"):
        vlv_hub.push(model, REPO, token="hf_other")


def test_a_missing_model_creates_no_repository(model, hub_server, capsys):
    assert main(["push", str(model / "nowhere"), REPO, "--token", "hf_org"]) == 2
    assert f"cannot load {model / 'nowhere'}" in capsys.readouterr().err
    assert not hub_server[0].repos


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"results": {"captions": 0.5}, "results_command": "x"}, r"\{subject: \{metric: value\}\}"),
        ({"results": RESULTS}, "--results-command"),
    ],
)
def test_results_of_another_form_are_refused(arguments, reason, model, tmp_path, capsys):
    with pytest.raises(ValueError, match=reason):
        Card(**arguments)
    (tmp_path / "results.json").write_text(json.dumps(arguments["results"]))
    options = ["--results", str(tmp_path / "results.json")]
    options += ["--results-command", arguments["results_command"]] if "results_command" in arguments else []
    assert main(["push", str(model), REPO, "--output", str(tmp_path / "out"), *options]) == 2
    assert "--results" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_training_metadata_of_version_0_1_is_listed_without_its_licences(model, tmp_path, capsys):
    folder = shutil.copytree(model, tmp_path / "old")
    old = {"encoder": "microsoft/Florence-2-base", "decoder": ["unknown"], "language_model": None, "steps": 3}
    (folder / vlv_hub.TRAINING_FILE).write_text(json.dumps({"stage1": old, "note": "text"}))
    card = (vlv_hub.write_repository(folder, tmp_path / "out", repo=REPO) / "README.md").read_text()
    assert "encoder: microsoft/Florence-2-base" in card and "base_model" not in front_matter(card)
    assert main(["info", str(folder)]) == 0
    assert "licences: not stated" in capsys.readouterr().out
