"""Writes and pushes the page as a Hugging Face Space: `vlv demo --push-space`.

A Space holds a copy of the packages that it needs, because no package index has this package.
"""

import os
import shutil
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.repocard import metadata_load, metadata_save

from vlv.hub.folders import new_folder

HERE = Path(__file__).parent
PACKAGES = ("vlv", "vlv.diffusion_decoder", "vlv.hub", "vlv.pipelines")  # what app.py needs


def write_space(folder: str | os.PathLike, model: str) -> Path:
    """Writes a Space's files: page, examples, requirements, the packages that the page uses, and the front matter.

    Args:
        folder: A new or empty folder.
        model: Repo id that the front matter links to. The page itself reads the variable `MODEL_ID`.

    Raises:
        ValueError: If `folder` is not empty.
    """
    root = Path(folder)
    with new_folder(root) as written:
        _write(written, model)
    return root


def _write(root: Path, model: str) -> None:
    for name in ("app.py", "README.md", "requirements.txt"):
        shutil.copyfile(HERE / name, root / name)
    shutil.copytree(HERE / "examples", root / "examples")
    metadata_save(root / "README.md", {**(metadata_load(root / "README.md") or {}), "models": [model]})
    copy_packages(PACKAGES, root)


def copy_packages(packages: Sequence[str], root: Path) -> None:
    """Copies the modules of packages, and what they read, into a Space's folder."""
    for package in packages:
        source = Path(str(import_module(package).__file__)).parent
        target = root.joinpath(*package.split("."))
        target.mkdir(parents=True)
        for path in source.iterdir():
            if path.suffix in (".py", ".md"):
                shutil.copyfile(path, target / path.name)


def push_space(
    space: str,
    model: str,
    *,
    revision: str | None = None,
    min_score: float | None = None,
    private: bool = False,
    token: str | None = None,
) -> str:
    """Creates or updates a Space that shows a model of the Hub.

    Args:
        space: The Space, as `org/name`.
        model: The model's repo id; it becomes the Space's variable `MODEL_ID`.
        revision: Branch, tag or commit of the model; it becomes the variable `MODEL_REVISION`. With a commit the page
            does not change when the model does.
        min_score: Captions with a lower diffusion score are marked; it becomes the variable `MIN_SCORE`. By default
            captions have no score.
        private: Whether a new Space is private. A Space with a private model needs a secret `HF_TOKEN`.
        token: Access token of an account that may write to `org`.

    Returns:
        The address of the commit.

    Raises:
        ValueError: If `private` is set and a public Space of this name exists.
    """
    api = HfApi(token=token)
    api.create_repo(space, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
    if private and not api.repo_info(space, repo_type="space").private:
        raise ValueError(
            f"{space} exists and is public; nothing was uploaded. Make it private first, or push elsewhere"
        )
    api.add_space_variable(space, "MODEL_ID", model)
    for name, value in (("MODEL_REVISION", revision), ("MIN_SCORE", min_score)):
        if value is not None:
            api.add_space_variable(space, name, str(value))
        elif name in api.get_space_variables(space):  # of an earlier push
            api.delete_space_variable(space, name)
    with tempfile.TemporaryDirectory(prefix="vlv-space-") as folder:
        write_space(folder, model)
        commit = api.upload_folder(
            repo_id=space,
            repo_type="space",
            folder_path=folder,
            commit_message="Upload the VLV page",
            delete_patterns=["vlv/**"],
        )
    return str(commit.commit_url)
