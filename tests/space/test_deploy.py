"""A Space runs from its own files; only its requirements need to be installed."""

import json
import os
import re
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from vlv.checkpoints import MINIATURE
from vlv.cli.main import main
from vlv.space.deploy import write_space

from ..hub.server import Hub, serve
from ..interpreter import run_python

HERE = Path(__file__).parents[2] / "space"


def test_requirements_are_the_package_s_own():
    wanted = [line.split(";") for line in requires("vlv")]
    core = {name.strip().replace(" ", "") for name, *extra in wanted if not extra or 'extra == "space"' in extra[0]}
    listed = (HERE / "requirements.txt").read_text().split()
    order = lambda text: (re.split("[<>=]", text)[0].lower(), *sorted(re.findall("[<>=]+[^,]+", text)))  # noqa: E731
    assert sorted(map(order, listed)) == sorted(map(order, core))


@pytest.mark.slow
def test_the_page_starts_from_only_the_files_of_a_space(tmp_path):
    space = write_space(tmp_path / "space", "org/vlv")
    front = yaml.safe_load((space / "README.md").read_text().split("---")[1])
    assert front["models"] == ["org/vlv"] and front["sdk"] == "gradio" and front["app_file"] == "app.py"
    script = """
import json, sys
sys.path.insert(0, ".")  # as `python app.py` has it
import app, vlv
demo = app.Demo(sys.argv[1])
caption = list(demo.caption(app.EXAMPLES[0], 30, "greedy", 1.0, 4))[-1]
modules = [m.__file__ for n, m in sys.modules.items() if n.split(".")[0] == "vlv" and getattr(m, "__file__", None)]
print(json.dumps([caption, modules, len(app.build(demo).fns)]))
"""
    done = run_python(script, [str(MINIATURE)], cwd=space, env=os.environ | {"GRADIO_ANALYTICS_ENABLED": "False"})
    assert done.returncode == 0, done.stderr[-3000:]
    caption, modules, functions = json.loads(done.stdout.splitlines()[-1])
    assert " background" in caption and functions >= 3
    assert modules and all(Path(path).is_relative_to(space) for path in modules), modules


def test_pushing_creates_and_updates_a_space(monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    hub = Hub()
    with serve(hub) as endpoint:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        push = ["demo", "--push-space", "org/page", "--token"]
        model = ["--model", "org/vlv", "--revision", "abc"]
        assert main([*push, "hf_org", *model, "--confidence", "--min-score", "0.2"]) == 0
        assert "pushed: " in capsys.readouterr().out
        space = hub.repos["spaces/org/page"]
        assert space.variables == {"MODEL_ID": "org/vlv", "MODEL_REVISION": "abc", "MIN_SCORE": "0.2"}
        files = set(space.at("main").files)
        assert {
            "app.py",
            "README.md",
            "requirements.txt",
            "vlv/modeling_vlv.py",
            "vlv/hub/model_card_template.md",
        } <= files
        assert not [name for name in files if "checkpoints" in name or name.endswith(".pyc")]
        space.commit("main", "older", {**space.at("main").files, "vlv/gone.py": b"", "LICENSE": b""})
        assert main([*push, "hf_org", *model]) == 0
        assert set(space.at("main").files) == {*files, "LICENSE"}
        assert space.variables == {"MODEL_ID": "org/vlv", "MODEL_REVISION": "abc"}  # captions have no score
        assert main([*push, "hf_org", "--model", "org/other"]) == 0
        assert space.variables == {"MODEL_ID": "org/other"}  # the revision belonged to the earlier model
        assert main([*push, "hf_org", "--model", "org/other", "--private"]) == 2
        assert "exists and is public" in capsys.readouterr().err
        for token, reason in (("hf_outsider", "may not write to org/page"), ("wrong", "wants a token")):
            assert main([*push, token, *model]) == 2
            assert reason in capsys.readouterr().err


@pytest.mark.parametrize("model", [[], ["--model", str(MINIATURE)], ["--model", "no-organisation"]])
def test_a_space_needs_a_model_of_the_hub(model, tmp_path, capsys):
    assert main(["demo", "--write-space", str(tmp_path / "space"), *model]) == 2
    assert "org/name" in capsys.readouterr().err.lower()


def test_a_space_is_not_written_over_other_files(tmp_path, capsys):
    (tmp_path / "old.txt").write_text("")
    assert main(["demo", "--write-space", str(tmp_path), "--model", "org/vlv"]) == 2
    assert "not empty" in capsys.readouterr().err
