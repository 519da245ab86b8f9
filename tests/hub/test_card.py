"""The model card is written once, and what somebody changed in it stays."""

import pytest
import yaml

from vlv import hub as vlv_hub
from vlv.cli.main import main

REPO = "org/vlv"


def test_a_card_changes_only_where_it_is_told_to(model, tmp_path):
    folder = vlv_hub.stage(model, tmp_path / "first", repo=REPO)
    card = folder / "README.md"
    text = card.read_text().replace("## Limits and risks", "## My own words\n\nStay.\n\n## Limits and risks")
    card.write_text(text)
    assert (vlv_hub.stage(folder, tmp_path / "same", repo=REPO) / "README.md").read_text() == text
    figures = {"results": {"captions": {"object_f1": 0.25}}, "results_command": "vlv evaluate y"}
    changed = (vlv_hub.stage(folder, tmp_path / "new", repo=REPO, license="mit", **figures) / "README.md").read_text()
    front, before = yaml.safe_load(changed.split("---")[1]), yaml.safe_load(text.split("---")[1])
    assert front["license"] == "mit" and front["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.25
    assert {**front, "license": 0, "model-index": 0} == {**before, "license": 0, "model-index": 0}
    assert "Printed by `vlv evaluate y`.\n\n| measured on" in changed and "| captions | object_f1 | 0.25 |" in changed
    assert "None were given" in text and "None were given" not in changed
    head, _, tail = changed.split("---", 2)[2].partition("## Figures")
    assert text.split("---", 2)[2].startswith(head)
    assert text.endswith(tail[tail.index("## My own words") :])


def test_a_card_that_was_edited_on_the_hub_is_kept_and_that_is_said(model, hub_server, caplog):
    hub, _ = hub_server

    def push(*more) -> str:
        caplog.clear()
        assert main(["push", str(model), REPO, "--token", "hf_org", *more]) == 0
        return hub.repos[REPO].at("main").files["README.md"].decode()

    first = push()
    second = push("--license", "mit")  # nobody edited it: written anew
    assert "license: mit" in second and "edited there" not in caplog.text
    edited = second.replace("# vlv\n", "# vlv\n\nA word of ours.\n")
    assert edited != second
    hub.repos[REPO].commit("main", "edit", {**hub.repos[REPO].at("main").files, "README.md": edited.encode()})
    assert push() == edited
    assert "edited there: it is kept." in caplog.text
    third = push("--license", "apache-2.0")
    assert "kept, but for license" in caplog.text
    assert "A word of ours." in third and "license: apache-2.0" in third
    assert push("--replace-card") == first and "edited there" not in caplog.text


def test_a_token_that_may_not_write_is_refused_before_any_work(model, hub_server, monkeypatch, capsys):
    monkeypatch.setattr(vlv_hub, "stage", lambda *a, **k: pytest.fail("staged before the token was tried"))
    assert main(["push", str(model), REPO, "--token", "hf_stranger"]) == 2
    assert "may not write" in capsys.readouterr().err
    assert main(["push", str(model / "nowhere"), REPO, "--token", "hf_org"]) == 2
    assert not hub_server[0].repos
