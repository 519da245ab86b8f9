"""Writes and pushes a metric as a Space, which `evaluate.load("org/name")` then finds: `vlv evaluate metric`."""

import ast
import os
import shutil
import tempfile
from importlib.metadata import requires
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.repocard import metadata_load

import vlv.evaluation
from vlv.hub.folders import new_folder

from .deploy import HERE, PACKAGES, copy_packages

SCRIPTS = Path(vlv.evaluation.__file__).parent / "metrics"
METRIC_PACKAGES = (*PACKAGES, "vlv.evaluation")
CARD = """---
title: {title}
emoji: 📏
colorFrom: blue
colorTo: pink
sdk: gradio
sdk_version: {sdk_version}
app_file: app.py
python_version: "3.11"
pinned: false
license: apache-2.0
tags:
- evaluate
- metric
description: >-
  {summary}
---

# {title}

{summary}

```python
import evaluate

metric = evaluate.load("{repo}")  # needs vlv with the extra vlv[eval]
print(metric.inputs_description)
result = metric.compute({arguments})
```

The page computes it in a browser. The same script is in VLV's source, where
`evaluate.load("evaluation/metrics/{name}")` loads it without a network.
"""
APP = '''"""The page of the metric {name}."""

from pathlib import Path

import evaluate

from vlv.evaluation.metric_page import build_page

page = build_page(evaluate.load(str(Path(__file__).parent / "{name}.py")))

if __name__ == "__main__":
    page.launch()
'''


def metric_names() -> list[str]:
    """The metrics of this package."""
    return sorted(path.name for path in SCRIPTS.iterdir() if (path / f"{path.name}.py").is_file())


def write_metric_space(name: str, folder: str | os.PathLike, repo: str | None = None) -> Path:
    """Writes a Space's files: the metric's script, its page, its card, requirements, and the packages that it uses.

    Args:
        name: One of `metric_names`.
        folder: A new or empty folder.
        repo: The Space, for the card; by default one of the folder's name.

    Raises:
        ValueError: If there is no such metric, or `folder` is not empty.
    """
    script = SCRIPTS / name / f"{name}.py"
    if name not in metric_names():
        raise ValueError(f"there is no metric {name!r}; there are {', '.join(metric_names())}")
    root = Path(folder)
    summary = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or name
    front = metadata_load(HERE / "README.md") or {}
    with new_folder(root) as written:
        shutil.copyfile(script, written / script.name)
        (written / "app.py").write_text(APP.format(name=name), encoding="utf-8")
        card = CARD.format(
            title=name.replace("_", " "),
            name=name,
            summary=" ".join(summary.split()),
            sdk_version=front["sdk_version"],
            repo=repo or f"org/{root.name}",
            arguments="predictions=..." if name == "caption_statistics" else "predictions=..., references=...",
        )
        (written / "README.md").write_text(card, encoding="utf-8")
        listed = (HERE / "requirements.txt").read_text(encoding="utf-8")
        (written / "requirements.txt").write_text(listed + "".join(f"{one}\n" for one in evaluation_requirements()))
        copy_packages(METRIC_PACKAGES, written)
    return root


def evaluation_requirements() -> list[str]:
    """What the extra vlv[eval] installs."""
    wanted = [line.split(";") for line in requires("vlv") or []]
    return sorted(name.strip() for name, *marker in wanted if marker and 'extra == "eval"' in marker[0])


def push_metric_space(space: str, name: str, *, private: bool = False, token: str | None = None) -> str:
    """Creates or updates the Space of a metric.

    Args:
        space: As `org/name`. `evaluate.load` wants the name of the Space to be that of the metric.
        name: One of `metric_names`.
        private: Whether a new Space is private.
        token: Access token of an account that may write to `org`.

    Returns:
        The address of the commit.

    Raises:
        ValueError: If the Space has another name than the metric.
    """
    if space.rpartition("/")[2] != name:
        raise ValueError(f"evaluate.load({space!r}) looks for a script of the Space's name; name the Space ORG/{name}")
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory(prefix="vlv-metric-") as folder:
        write_metric_space(name, folder, space)
        api.create_repo(space, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=space,
            repo_type="space",
            folder_path=folder,
            commit_message=f"Upload the metric {name}",
            delete_patterns=["vlv/**"],
        )
    return str(commit.commit_url)
