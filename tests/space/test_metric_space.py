"""A metric as a Space: its files, its page over HTTP, and what is refused."""

import ast
import os

import pytest
import yaml

from vlv.cli.main import main
from vlv.evaluation.caption_metrics import cider_d
from vlv.space.metric_space import evaluation_requirements, metric_names, write_metric_space

from ..interpreter import run_python


def test_every_metric_has_a_space(tmp_path):
    assert {"fid", "cider_d", "chair"} <= set(metric_names())
    for name in metric_names():
        space = write_metric_space(name, tmp_path / name)
        front = yaml.safe_load((space / "README.md").read_text().split("---")[1])
        assert (
            front["sdk"] == "gradio"
            and front["tags"] == ["evaluate", "metric"]
            and front["title"]
            and front["description"]
        )
        assert f'evaluate.load("org/{name}")' in (space / "README.md").read_text()
        compile((space / "app.py").read_text(), "app.py", "exec")
        assert (space / f"{name}.py").is_file() and (space / "vlv" / "evaluation" / "modules.py").is_file()
    assert set(evaluation_requirements()) <= set((space / "requirements.txt").read_text().split("\n"))
    assert any(line.startswith("evaluate>=") for line in evaluation_requirements())


@pytest.mark.slow
def test_the_page_computes_from_only_the_files_of_its_space(tmp_path):
    space = write_metric_space("cider_d", tmp_path / "cider_d")
    script = """
import sys
sys.path.insert(0, ".")  # as `python app.py` has it
import app, vlv
from gradio_client import Client
assert vlv.__file__.startswith(sys.argv[1]), vlv.__file__
_, url, _ = app.page.launch(prevent_thread_lock=True, quiet=True)
client = Client(url, verbose=False)
rows = {"headers": ["predictions", "references"], "metadata": None}
rows["data"] = [['"a red dog"', '["a dog", "a red dog runs"]'], ["two cats sleep", '["cats sleep"]']]
print(client.predict(rows, "{}", api_name="/compute"))
rows["data"] = [["a dog", "not a list"]]
try:
    client.predict(rows, "{}", api_name="/compute")
except Exception as error:
    print("refused:", error)
"""
    environment = os.environ | {"GRADIO_ANALYTICS_ENABLED": "False"}
    done = run_python(script, [str(space)], cwd=space, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    result, refused = done.stdout.splitlines()[-2:]
    scores = cider_d(["a red dog", "two cats sleep"], [["a dog", "a red dog runs"], ["cats sleep"]])
    found = ast.literal_eval(result)
    assert found["cider_d"] == pytest.approx(sum(scores) / 2) and found["scores"] == pytest.approx(scores)
    assert refused.startswith("refused:") and "JSONDecodeError" in refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["fidd", "--write-space", "s"], "there is no metric 'fidd'; there are bert_score, bleu"),
        (["fid"], "give one of --write-space DIR and --push-space ORG/NAME"),
        (["fid", "--push-space", "org/other"], "name the Space ORG/fid"),
    ],
)
def test_what_cannot_be_a_metric_s_space_is_refused(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "metric", *options]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())
