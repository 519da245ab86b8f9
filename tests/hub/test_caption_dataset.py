"""Data sets of the Hub: `vlv caption --dataset` captions them, `jobs/caption-dataset.py` pushes them with captions."""

import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from datasets import Dataset, Features, Value, config, load_dataset
from datasets import Image as ImageFeature
from huggingface_hub import constants

from vlv.captioning.caption_column import to_dataset
from vlv.captioning.sharded import ShardCaptioner
from vlv.captioning.shards import ShardFolder
from vlv.cli.main import main
from vlv.errors import UserError
from vlv.files import write_json

from ..builders import NOT_PACKAGED

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "jobs" / "caption-dataset.py"
SETTINGS = ["--model", "org/vlv", "--max-new-tokens", "4"]
REASON = "is not in the data set org/pictures"


@pytest.fixture
def hub(hub_server, model, images, tmp_path, monkeypatch):
    """A Hub with a model and two data sets: `org/pictures` in parquet files, and `org/files` as a folder of images.

    Of the seven pictures, the fifth is damaged, and the sixth is a file of this machine.
    """
    hub, endpoint = hub_server
    for module, name, value in (
        (config, "HF_ENDPOINT", endpoint),
        (config, "HF_HUB_OFFLINE", False),
        (config, "HF_DATASETS_CACHE", str(tmp_path / "datasets")),
        (config, "DOWNLOADED_DATASETS_PATH", str(tmp_path / "datasets" / "downloads")),
        (constants, "HF_HUB_CACHE", str(tmp_path / "hub")),
    ):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_org")
    monkeypatch.chdir(tmp_path)
    contents = [encoded(image) for image in images[:7]]
    contents[4] = b"damaged"
    Path("own.png").write_bytes(contents[5])
    pictures = [{"bytes": data, "path": f"{number}.png"} for number, data in enumerate(contents)]
    pictures[5] = {"bytes": None, "path": str(tmp_path / "own.png")}
    features = Features({"image": ImageFeature(), "label": Value("int8")})
    table = Dataset.from_dict({"image": pictures, "label": list(range(7))}, features=features)
    for name, rows in (
        ("train-00000-of-00002", (0, 3)),
        ("train-00001-of-00002", (3, 7)),
        ("test-00000-of-00001", (0, 2)),
    ):
        path = Path("pictures", "data", f"{name}.parquet")
        path.parent.mkdir(parents=True, exist_ok=True)
        table.select(range(*rows)).to_parquet(path)
    Path("files").mkdir()
    for number in range(2):
        Path("files", f"{number}.png").write_bytes(contents[number])
    hub.add_folder("datasets/org/pictures", Path("pictures"))
    hub.add_folder("datasets/org/files", Path("files"))
    hub.add_folder("org/vlv", model)
    return hub


def encoded(image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def caption(*options) -> dict[str, str]:
    """What `vlv caption` writes."""
    assert main(["caption", *SETTINGS, "--output", "captions.json", "--overwrite", *options]) in (0, 1)
    return json.loads(Path("captions.json").read_text())


def run_script(*arguments) -> int:
    return runpy.run_path(str(SCRIPT))["main"]([*arguments])


def commits(hub, name: str) -> list[str]:
    return [commit.title for commit in hub.repos[f"datasets/{name}"].commits.values()]


def test_a_data_set_of_the_hub_is_captioned_by_its_name(hub, capsys):
    captions = caption("--dataset", "org/pictures", "--streaming")
    assert list(captions) == [f"train/{row}" for row in (0, 1, 2, 3, 6)]
    assert REASON in capsys.readouterr().err
    of_files = caption("--dataset", "org/files", "--streaming")
    assert of_files == caption("--dataset", "org/files") == {name: captions[name] for name in ("train/0", "train/1")}
    assert caption("--dataset", "org/pictures") == captions
    assert main(["caption", *SETTINGS, "--dataset", "org/pictures", "--resume"]) == 1
    assert "kept 5, captioned 0, failed 2" in capsys.readouterr().err
    for options, message in (
        (["org/nothing"], "org/nothing cannot be read: Dataset 'org/nothing' doesn't exist on the Hub"),
        (["org/pictures", "--split", "val"], 'Unknown split "val". Should be one of'),
        (["org/pictures", "--split", "val", "--streaming"], "Bad split: val. Available splits"),
        (["org/pictures", "--image-column", "photo"], "no 'photo'; name one by --image-column"),
        (["org/pictures", "--image-column", "photo", "--streaming"], "no 'photo'; name one by --image-column"),
    ):
        assert main(["caption", *SETTINGS, "--output", "x.json", "--dataset", *options]) == 2
        assert f"--dataset {options[0]}: " in (said := capsys.readouterr().err) and message in said


def test_shards_of_a_data_set_of_the_hub_are_of_the_commit_of_their_start(hub, tmp_path, monkeypatch, capsys):
    """Whatever the machine, here with another cache, and whatever comes after it."""
    run = {"shards": 2, "model": "m", "fingerprint": "f", "settings": {}, "inputs": []}
    run |= {"dataset": {"name": "org/pictures", "split": "train"}}
    ShardFolder.begin(tmp_path / "out", [], run)
    repo = hub.repos["datasets/org/pictures"]
    before, (head, *_) = dict(repo.at("main").files), repo.commits
    train, test = (next(name for name in before if split in name) for split in ("train", "test"))
    rows = [item.open().content for item in ShardFolder.open_existing(tmp_path / "out").inputs(0)]
    repo.commit("main", "another commit", before | {train: before[test]})
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path / "second"))
    shards = ShardFolder.open_existing(tmp_path / "out")
    assert [item.name for item in shards.inputs(0)] == ["train/0", "train/1", "train/2"]
    assert [item.open().content for item in shards.inputs(0)] == rows
    write_json(tmp_path / "out" / "run.json", shards.run | {"counts": shards.run["counts"] | {"commit": None}})
    with pytest.raises(UserError, match="org/pictures has changed since the run was begun"):
        ShardFolder.open_existing(tmp_path / "out").inputs(0)
    assert [*caption("--dataset", "org/pictures")] == [f"train/{row}" for row in range(5)]
    for streaming in ([], ["--streaming"]):
        captions = caption("--dataset", "org/pictures", "--dataset-revision", head, *streaming)
        assert list(captions) == [f"train/{row}" for row in (0, 1, 2, 3, 6)]
    assert main(["caption", *SETTINGS, "--dataset", "pictures", "--dataset-revision", head]) == 2
    assert "--dataset-revision needs --dataset ORG/NAME of the Hub" in capsys.readouterr().err


def test_a_job_that_is_given_again_goes_on_and_pushes_the_captions_of_vlv_caption(hub, monkeypatch, capsys):
    arguments = ("org/pictures", "org/captioned", *SETTINGS, "--shard-size", "2")
    whole, calls = ShardCaptioner.caption_inputs, []

    def end_in_the_third(self, inputs, summary):
        calls.append(inputs)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(self, inputs, summary)

    monkeypatch.setattr(ShardCaptioner, "caption_inputs", end_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        run_script(*arguments)
    assert len(load_dataset("org/captioned", split="train", token="hf_org")) == 4
    assert run_script(*arguments) == 1  # two images have no captions
    assert "4 rows of org/captioned are done" in capsys.readouterr().err
    assert commits(hub, "org/captioned")[1:] == [
        *(f"Add the captions of {rows} rows" for rows in (2, 4, 6, 7)),
        "Complete the captions of 7 rows",
    ]
    hub.forget_traffic()
    assert run_script(*arguments) == 0 and len(commits(hub, "org/captioned")) == 6
    assert not any(name.endswith(".safetensors") for name in hub.downloads)
    assert "has the captions of 7 rows; nothing is left to do" in capsys.readouterr().err

    pushed, expected = load_dataset("org/captioned", split="train"), caption("--dataset", "org/pictures")
    assert pushed["caption"] == [expected.get(f"train/{row}") for row in range(7)]
    assert pushed["label"] == list(range(7)) and isinstance(pushed.features["image"], ImageFeature)
    images = pushed.cast_column("image", ImageFeature(decode=False))["image"]
    assert images[4]["bytes"] == b"damaged" and images[5] is None  # the file of this machine is not pushed
    files = hub.repos["datasets/org/captioned"].at("main").files
    record = json.loads(files[".captioning/train.json"])
    assert [list(shard["failed"]) for shard in record["shards"]] == [[], [], ["train/4", "train/5"], []]
    model = hub.repos["org/vlv"].at("main").sha
    assert record["fingerprint"] == model and record["settings"]["max_new_tokens"] == "4"
    card = files["README.md"].decode()
    for text in (
        "[org/vlv](https://huggingface.co/org/vlv)",
        model,
        record["dataset_revision"],
        "`4`",
        "caption-dataset.py org/pictures",
    ):
        assert text in card

    assert run_script("org/pictures", "org/captioned", *SETTINGS, "--split", "test", "--streaming") == 0
    both = load_dataset("org/captioned")
    assert both["test"]["caption"] == pushed["caption"][:2] and both["train"]["caption"] == pushed["caption"]
    assert run_script(*arguments, "--trim") == 2
    assert "has captions of another run (settings" in capsys.readouterr().err


def test_a_stream_and_a_shuffled_data_set_are_captioned(hub):
    expected = caption("--dataset", "org/pictures")
    sizes = ("--shard-size", "2", "--max-samples", "3", "--private")
    assert run_script("org/pictures", "org/streamed", *SETTINGS, *sizes, "--streaming") == 0
    assert load_dataset("org/streamed", split="train")["caption"] == [expected[f"train/{row}"] for row in range(3)]
    assert hub.repos["datasets/org/streamed"].private
    assert run_script("org/pictures", "org/shuffled", *SETTINGS, *sizes, "--shuffle", "--seed", "1") in (0, 1)
    shuffled = load_dataset("org/shuffled", split="train")
    assert shuffled["caption"] == [expected.get(f"train/{row}") for row in shuffled["label"]]
    assert shuffled["label"] != [0, 1, 2]
    samples = ("--num-captions", "2", "--caption-column", "captions", "--streaming")
    assert run_script("org/files", "org/of-files", *SETTINGS, *samples) == 0
    of_files = load_dataset("org/of-files", split="train")
    assert [len(captions) for captions in of_files["captions"]] == [2, 2]
    assert of_files["captions"] == list(caption("--dataset", "org/files", "--num-captions", "2").values())
    images = of_files.cast_column("image", ImageFeature(decode=False))["image"]
    assert [image["bytes"] for image in images] == [Path("files", f"{row}.png").read_bytes() for row in range(2)]


def test_jobs_for_one_data_set_know_each_other(hub, capsys):
    """Another split is kept, and another job for the same split ends this one."""
    whole = ("org/files", "org/both", *SETTINGS, "--streaming")

    def other(record: str) -> None:
        repo = hub.repos["datasets/org/both"]
        files = repo.at("main").files
        of_train = json.loads(files[".captioning/train.json"])
        repo.commit("main", "another job", files | {record: json.dumps(of_train | {"command": "other"}).encode()})

    hub.before_commit = [lambda: None, lambda: other(".captioning/test.json")]
    assert run_script(*whole, "--shard-size", "1", "--max-samples", "1") == 0
    files = hub.repos["datasets/org/both"].at("main").files
    assert json.loads(files[".captioning/train.json"])["complete"] and "## test" in files["README.md"].decode()
    del hub.repos["datasets/org/both"]
    hub.before_commit = [lambda: None, lambda: other(".captioning/train.json")]
    assert run_script(*whole, "--shard-size", "1") == 2
    assert "another job writes the split train of org/both; end it" in capsys.readouterr().err
    assert len(commits(hub, "org/both")) == 3


def test_columns_and_rows_that_cannot_be_pushed_are_named(hub, capsys):
    features = Features({"image": ImageFeature(), "more": [ImageFeature()]})
    Path("lists").mkdir()
    rows = {"image": [str(Path("own.png"))], "more": [[str(Path("own.png"))]]}
    Dataset.from_dict(rows, features=features).to_parquet("lists/train.parquet")
    hub.add_folder("datasets/org/lists", Path("lists"))
    assert run_script("org/lists", "org/out", *SETTINGS) == 2
    assert "org/lists has files that are not pushed in more" in capsys.readouterr().err
    numbers = Features({"label": Value("int8")})
    assert to_dataset("org/x", [{"label": 1}] * 45, numbers)["label"] == [1] * 45
    with pytest.raises(UserError, match="org/x has rows of other types"):
        to_dataset("org/x", [{"label": "a"}], numbers)


def test_errors_of_a_job_say_what_to_do(hub, monkeypatch, capsys):
    whole = ["org/pictures", "org/out", *SETTINGS]
    hub.add_folder("datasets/org/restricted", Path("files"))
    hub.repos["datasets/org/restricted"].gated = True
    for arguments, message in (
        (["org/nothing", *whole[1:]], "there is no data set org/nothing on the Hub"),
        ([*whole, "--dataset-revision", "v9"], "org/pictures has no revision v9"),
        ([*whole, "--split", "val"], "org/pictures, split val: "),
        ([*whole, "--image-column", "photo"], "no 'photo'; name one by --image-column"),
        ([*whole, "--caption-column", "label"], "has a column 'label'; name another by --caption-column"),
        ([*whole, "--shuffle", "--streaming"], "leave one of them out"),
        ([*whole, "--shuffle", "--seed", "-1"], "--seed is -1; expected 0 or more"),
        (["org/restricted", *whole[1:]], "INPUT is private or gated, and org/out would be public; pass --private"),
        ([*whole, "--model", "org/none"], "cannot load org/none"),
        (whole[:2], "--model is missing"),
        ([whole[0], "other/out", *whole[2:]], "this token may not write to other/out"),
        ([whole[0], "org/files", *whole[2:], "--private"], "org/files exists and is public"),
        ([whole[0], "org/files", *whole[2:]], "org/files has 0.png, which is not of this command"),
        ([whole[0], whole[0], *whole[2:]], "OUTPUT is INPUT, org/pictures"),
    ):
        assert run_script(*arguments) == 2
        assert message in capsys.readouterr().err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "none")
    assert run_script(*whole) == 2
    assert "set HF_TOKEN, or run `hf auth login`" in capsys.readouterr().err
    assert "datasets/org/out" not in hub.repos


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not installed")
def test_uv_runs_the_script_with_the_dependencies_in_its_header(hub_server, hub, tmp_path):
    environment = os.environ | {"HF_ENDPOINT": hub_server[1], "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=NOT_PACKAGED)  # where setuptools may write
    command = ["uv", "run", "--with", str(source), str(SCRIPT), "org/pictures", "org/by-uv", *SETTINGS]
    done = subprocess.run([*command, "--max-samples", "3"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pushed, expected = load_dataset("org/by-uv", split="train"), caption("--dataset", "org/pictures")
    assert pushed["caption"] == [expected[f"train/{row}"] for row in range(3)]


def test_the_commands_of_the_documentation_are_understood():
    text = (ROOT / "docs" / "bulk.md").read_text(encoding="utf-8").replace("\\\n", "")
    commands = re.findall(r"^[^`\n]* jobs/caption-dataset\.py (.*)$", text, re.MULTILINE)
    parser = runpy.run_path(str(SCRIPT))["build_parser"]()
    assert len(commands) == 2 and all(parser.parse_args(shlex.split(line, comments=True)).model for line in commands)
