"""The page as a Hugging Face Space: `vlv demo --push-space`.

The Space carries the code that it runs, since this package is on no index that a Space could install it from.
"""

import os
import shutil
import tempfile
from importlib import import_module
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.repocard import metadata_load, metadata_save

HERE = Path(__file__).parent
PACKAGES = ("vlv", "vlv.diffusion_decoder", "vlv.hub", "vlv.pipelines")  # what app.py needs


def write_space(folder: str | os.PathLike, model: str) -> Path:
    """Writes a Space's files: page, examples, requirements, the packages that the page uses, and the front matter.

    Args:
        folder: New or empty.
        model: Repo id that the front matter links to. The page itself takes it from the variable `MODEL_ID`.

    Raises:
        ValueError: If `folder` is not empty.
    """
    root = Path(folder)
    if root.is_dir() and any(root.iterdir()):
        raise ValueError(f"{root} is not empty; name a new folder")
    root.mkdir(parents=True, exist_ok=True)
    for name in ("app.py", "README.md", "requirements.txt"):
        shutil.copyfile(HERE / name, root / name)
    shutil.copytree(HERE / "examples", root / "examples")
    metadata_save(root / "README.md", {**(metadata_load(root / "README.md") or {}), "models": [model]})
    for package in PACKAGES:
        source = Path(str(import_module(package).__file__)).parent
        target = root.joinpath(*package.split("."))
        target.mkdir(parents=True)
        for path in source.iterdir():
            if path.suffix in (".py", ".md"):
                shutil.copyfile(path, target / path.name)
    return root


def push_space(
    space: str,
    model: str,
    *,
    revision: str | None = None,
    private: bool = False,
    token: str | None = None,
) -> str:
    """Creates or updates a Space that shows a model of the Hub.

    Args:
        space: The Space, as `org/name`.
        model: The model's repo id: the Space's variable `MODEL_ID`.
        revision: Of the model, the variable `MODEL_REVISION`; pin a commit for a page that lasts.
        private: Whether a Space that is created is private. One with a private model needs a secret `HF_TOKEN`.
        token: Of an account that may write to `org`.

    Returns:
        The address of the commit.
    """
    api = HfApi(token=token)
    api.create_repo(space, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
    api.add_space_variable(space, "MODEL_ID", model)
    if revision is not None:
        api.add_space_variable(space, "MODEL_REVISION", revision)
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
