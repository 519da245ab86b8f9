"""`vlv evaluate judge`, `vqa` and `agreement`, with YAML files."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from PIL import Image

from vlv.cli.main import main

from .openai_server import Reply, scripted_endpoint

CONFIGS = Path(__file__).parent.parent.parent / "evaluation" / "configs"
NUM_IMAGES = 33  # one more than the examples of the longest prompt


def write_caption_files(folder: Path) -> None:
    """Images, captions, questions and annotations where the shipped configurations expect them."""
    names = [f"COCO_val2014_{number:012}.jpg" for number in range(NUM_IMAGES)]
    for images in ("coco/val2014-200", "coco/val2014-30k", "coco/test2017"):
        (folder / images).mkdir(parents=True)
        for name in names:
            Image.new("RGB", (8, 8)).save(folder / images / name)
    for file in ("captions.json", "other.json", "captions-val.json", "captions-train.json", "captions-qa.json"):
        (folder / file).write_text(json.dumps(dict.fromkeys(names, "a red car")))
    choices = {"question": "What colour?", "choices": ["red", "blue"], "answer": "red"}
    (folder / "caption-qa").mkdir()
    (folder / "caption-qa" / "questions.json").write_text(json.dumps([{"image": name} | choices for name in names]))
    ids = range(NUM_IMAGES)
    questions = {"questions": [{"question_id": n, "image_id": n, "question": "What colour?"} for n in ids]}
    annotations = {"annotations": [{"question_id": n, "answers": [{"answer": "red"}] * 10} for n in ids]}
    for data_set, prefix in (("vqa", "v2_"), ("okvqa", "")):
        (folder / data_set).mkdir()
        for split in ("val2014", "train2014"):
            for content, file in (
                (questions, f"OpenEnded_mscoco_{split}_questions"),
                (annotations, f"mscoco_{split}"),
            ):
                suffix = "_annotations" if content is annotations else ""
                (folder / data_set / f"{prefix}{file}{suffix}.json").write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with those files in it."""
    write_caption_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


CYCLE = f", of at most 300 tokens\n{4 * NUM_IMAGES} images by stabilityai/stable-diffusion-3.5-medium, of 512 pixels"
PLANS = {  # in the plan of each file's first command
    "arena.yaml": f"{NUM_IMAGES} requests",
    "vqav2.yaml": f"{6 * NUM_IMAGES} requests",  # three numbers of shots, with captions and without
    "ok_vqa.yaml": f"{6 * NUM_IMAGES} requests",
    "caption_qa.yaml": f"{2 * NUM_IMAGES} requests",
    "cycle.yaml": f"{NUM_IMAGES} captions by org/vlv{CYCLE}",
    "table4_caption.yaml": f"{NUM_IMAGES} captions by org/vlv{CYCLE}",
    "table4_reconstruction.yaml": f"{4 * NUM_IMAGES} images by org/vlv, of the model's size, with 50 steps",
    "table5_decoder.yaml": f"{NUM_IMAGES} captions by org/vlv{CYCLE}",
    "table7.yaml": f"{NUM_IMAGES} captions by org/vlv-mlp-llm{CYCLE}",
    "reconstruction.yaml": f"{4 * NUM_IMAGES} images by org/vlv, of the model's size, with 50 steps",
    "spatial.yaml": f"{NUM_IMAGES} images by org/vlv",
    "composition.yaml": f"{5 * (NUM_IMAGES // 2)} images by org/vlv",
}
COMMAND = re.compile(r"^#   vlv evaluate (.+)$", re.MULTILINE)


@pytest.mark.parametrize("file", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_every_shipped_configuration_has_a_plan_by_each_command_in_it(folder, capsys, file):
    commands = [shlex.split(command) for command in COMMAND.findall((CONFIGS / file).read_text())]
    plans = []
    for protocol, named, *settings in commands:
        assert named == f"evaluation/configs/{file}"
        assert main(["evaluate", protocol, str(CONFIGS / file), *settings, "--dry_run"]) == 0
        plans.append(capsys.readouterr().out)
    assert plans[0].startswith(PLANS[file]) and len(set(plans)) == len(commands) and not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("protocol", "file", "settings", "plan"),
    [
        ("judge", "arena.yaml", ["--against", "captions-val.json"], f"{2 * NUM_IMAGES} requests"),
        ("vqa", "ok_vqa.yaml", ["--limit", "2"], "12 requests"),
        ("cycle", "cycle.yaml", ["--limit", "2", "--guidance", "2"], "2 captions by org/vlv"),
        ("composition", "composition.yaml", ["--limit", "4", "--counts", "9+8"], "2 images by org/vlv"),
    ],
)
def test_options_change_a_plan(folder, capsys, protocol, file, settings, plan):
    assert main(["evaluate", protocol, str(CONFIGS / file), *settings, "--dry_run"]) == 0
    assert capsys.readouterr().out.startswith(plan)


@pytest.mark.slow
def test_the_commands_ask_an_endpoint_and_write_results(folder, capsys):
    common = {"endpoint_model": "reader", "limit": 3, "max_retries": 0}
    with scripted_endpoint(lambda words, before: Reply("red$" if "Short answer" in words else "Score: 4")) as script:
        judge = common | {"base_url": script.url, "images": "coco/val2014-200", "captions": "captions.json"}
        vqa = common | {"base_url": script.url, "captions": "captions-val.json", "shots": [0, 2], "blind": False}
        for kind in ("questions", "annotations"):
            file = f"vqa/v2_{'OpenEnded_' * (kind == 'questions')}mscoco_val2014_{kind}.json"
            vqa |= {kind: file, f"support_{kind}": file, "support_captions": "captions-train.json"}
        for name, content in (("judge", judge), ("vqa", vqa)):
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(content | {"output_dir": f"runs/{name}"}))
        assert main(["evaluate", "judge", "judge.yaml"]) == 0
        assert "| 3 | 0 | 4.00 | 4.00 to 4.00 |\n" in capsys.readouterr().out
        assert main(["evaluate", "vqa", "vqa.yaml"]) == 0
        assert "| 2 shots, captions | 3 | 0 | 0 | 100.00 |" in capsys.readouterr().out
        assert len(script.requests) == 3 + 6
        assert main(["evaluate", "judge", "judge.yaml", "--output_dir", "runs/other"]) == 0
        assert main(["evaluate", "judge", "judge.yaml"]) == 0  # from its log
        assert len(script.requests) == 3 + 6 + 3
    assert "0 answered, 3 kept from runs/judge/answers.jsonl" in capsys.readouterr().err
    assert json.loads((folder / "runs/judge/results.json").read_text())["totals"]["prompt_tokens"] == 300
    assert main(["evaluate", "agreement", "runs/judge/results.json", "runs/other/results.json"]) == 0
    assert capsys.readouterr().out == "3 captions: weighted kappa 1.00, equal scores 100%\n"
    assert main(["evaluate", "agreement", "runs/judge/results.json", "captions.json"]) == 2
    assert "captions.json is not a results.json of vlv evaluate judge" in capsys.readouterr().err


def test_a_missing_key_and_a_wrong_setting_are_named(folder, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    settings = ["--endpoint_model", "m", "--images", "coco/val2014-200", "--captions", "captions.json"]
    assert main(["evaluate", "judge", *settings, "--output_dir", "run"]) == 2
    assert "the environment variable OPENAI_API_KEY is not set" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", "judge", *settings, "--output_dir", "run", "--limit", "0"])
    assert "limit is 0; it must be at least 1" in capsys.readouterr().err
