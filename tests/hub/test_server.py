"""The Hub server of the tests answers huggingface_hub's client as the real Hub does."""

from pathlib import Path

import pytest
from huggingface_hub import HfApi, HfFileSystem, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "folder"
    (root / "deep" / "er").mkdir(parents=True)
    (root / "config.json").write_text("{}")
    (root / "deep" / "er" / "notes.txt").write_text("text\n")
    (root / "deep" / "weights.safetensors").write_bytes(bytes(range(256)) * 1000)
    return root


@pytest.fixture
def api(hub_server):
    return HfApi(endpoint=hub_server[1], token="hf_org")


def test_an_uploaded_folder_downloads_unchanged(api, hub_server, folder, tmp_path):
    api.create_repo("org/vlv")
    with pytest.raises(HfHubHTTPError):
        api.create_repo("org/vlv")
    api.create_repo("org/vlv", exist_ok=True)
    api.upload_folder(repo_id="org/vlv", folder_path=folder)
    copy = snapshot_download("org/vlv", endpoint=hub_server[1], cache_dir=tmp_path / "cache")
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        assert (tmp_path / copy / path.relative_to(folder)).read_bytes() == path.read_bytes()
    assert [c.title for c in api.list_repo_commits("org/vlv")][-1] == "initial commit"
    files = HfFileSystem(endpoint=hub_server[1], token="hf_org")
    assert "org/vlv/deep/weights.safetensors" in files.ls("org/vlv/deep", detail=False)
    with files.open("org/vlv/deep/weights.safetensors") as opened:
        opened.seek(300)
        assert opened.read(3) == bytes([44, 45, 46])


def test_a_large_file_is_uploaded_once(api, hub_server, folder):
    hub, _ = hub_server
    api.create_repo("org/vlv")
    api.upload_folder(repo_id="org/vlv", folder_path=folder)
    hub.forget_traffic()
    api.upload_folder(repo_id="org/vlv", folder_path=folder)
    assert hub.uploads == 0


def test_revisions_branches_and_tags(api, hub_server, folder, tmp_path):
    api.create_repo("org/vlv")
    first = api.upload_folder(repo_id="org/vlv", folder_path=folder).oid
    api.create_branch("org/vlv", branch="next")
    api.create_tag("org/vlv", tag="v1")
    (folder / "config.json").write_text('{"a": 1}')
    api.upload_folder(repo_id="org/vlv", folder_path=folder, revision="next")

    def read(revision: str) -> str:
        return Path(
            api.hf_hub_download("org/vlv", "config.json", revision=revision, cache_dir=tmp_path / "c")
        ).read_text()

    assert [read(r) for r in ("main", first, "v1", "next")] == ["{}", "{}", "{}", '{"a": 1}']
    refs = api.list_repo_refs("org/vlv")
    assert {b.name for b in refs.branches} == {"main", "next"} and refs.tags[0].target_commit == first


def test_missing_and_forbidden_requests_are_refused_as_on_the_hub(api, hub_server, folder, tmp_path):
    endpoint = hub_server[1]
    api.create_repo("org/vlv", private=True)
    api.upload_folder(repo_id="org/vlv", folder_path=folder)
    cache = {"cache_dir": tmp_path / "cache"}
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download("org/vlv", "nothing.json", **cache)
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download("org/vlv", "config.json", revision="nowhere", **cache)
    for token in (False, "hf_other"):
        with pytest.raises(RepositoryNotFoundError):
            HfApi(endpoint=endpoint, token=token).model_info("org/vlv")
    for token, status in ((False, 401), ("hf_other", 403)):
        with pytest.raises(HfHubHTTPError) as refused:
            HfApi(endpoint=endpoint, token=token).create_repo("org/other")
        assert refused.value.response.status_code == status
    assert HfApi(endpoint=endpoint, token="hf_org").whoami()["name"] == "org"
