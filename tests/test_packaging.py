"""What a user installs works: every package imports from the wheel, outside the checkout, and stays light."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from .builders import NOT_PACKAGED

ROOT = Path(__file__).parent.parent
PACKAGES = ["vlv", "vlv.hub", "vlv.diffusion_decoder", "vlv.pipelines", "vlv.train", "vlv.evaluation", "vlv.miniature"]
PACKAGES += ["vlv.preparation", "vlv.miniature.paper", "vlv.space", "vlv.serving", "vlv.captioning", "vlv.cli"]
PACKAGES += ["vlv.cli.parsers", "vlv.checkpoints"]
NOT_FOR_LIGHT_USES = {"datasets", "gradio", "matplotlib", "torchvision", "torchmetrics"}
NOT_FOR_CAPTIONS = {*NOT_FOR_LIGHT_USES, "diffusers.models.autoencoders", "diffusers.pipelines.pipeline_utils"}


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The Python of an environment that has the wheel and, beside it, only this environment's libraries."""
    folder = tmp_path_factory.mktemp("installed")
    # A copy: in the checkout, setuptools would use build/, which holds the links of the editable install.
    source = shutil.copytree(ROOT, folder / "source", ignore=NOT_PACKAGED)
    venv.create(folder / "env")
    python = folder / "env" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", str(python))
    add_libraries(python)  # setuptools among them
    run(*pip, "install", "--no-deps", "--no-build-isolation", str(source), cwd=folder)
    return python


def add_libraries(python: Path) -> None:
    """Gives an environment this environment's libraries."""
    site = run(str(python), "-c", "import site; print(site.getsitepackages()[0])", cwd=python.parent).strip()
    # Appended, so that the installed vlv comes first; a .pth in these folders (an editable vlv) is not followed.
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (Path(site) / "zz_libraries.pth").write_text("\n".join(libraries) + "\n")


@pytest.mark.slow
def test_an_editable_clone_named_vlv_works_beside_itself(tmp_path):
    """There, Python sees the clone as a namespace package of that name."""
    clone = shutil.copytree(ROOT, tmp_path / "vlv", ignore=NOT_PACKAGED)
    venv.create(tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    add_libraries(python)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", str(python))
    run(*pip, "install", "--no-deps", "--no-build-isolation", "--editable", str(clone), cwd=tmp_path)
    code = "import importlib.util; print(importlib.util.find_spec('vlv').origin); import vlv.cli.main"
    assert run(str(python), "-c", code, cwd=tmp_path).startswith(str(clone / "build"))


@pytest.mark.slow
def test_the_wheel_has_the_data(installed):
    (package,) = installed.parent.parent.glob("lib/python*/site-packages/vlv")
    for name in ("stage1.yaml", "stage2.yaml", "stage3/sd21.yaml", "accelerate/fsdp2_8gpu.yaml"):
        assert (package / "train" / "configs" / name).is_file()
    assert (package / "checkpoints" / "vlv-miniature" / "config.json").is_file()
    assert (package / "hub" / "model_card_template.md").is_file()
    assert (package / "evaluation" / "metrics" / "fid" / "fid.py").is_file()
    assert len(list((package / "space" / "examples").glob("*.png"))) > 3


@pytest.mark.slow
def test_the_wheel_imports_outside_the_checkout_without_the_network_and_light_uses_load_no_heavy_library(
    installed, tmp_path
):
    code = f"""
import contextlib, importlib, os, runpy, socket, sys
def refuse(*arguments, **settings):
    raise AssertionError("an import used the network")
socket.socket.connect = socket.getaddrinfo = refuse
def check(use, heavy):
    loaded = heavy & set(sys.modules)
    assert not loaded, f"{{use}} loads {{loaded}}"
from vlv.cli.main import build_parser, main
helps = [[], *([name] for name in build_parser()._subparsers._group_actions[0].choices if name != "train"), ["train"]]
subjects = ("miniature", "images", "captions", "agreement", "cycle", "reconstruction", "spatial", "composition")
helps += [["train", "stage1"], ["train", "stage2"], ["train", "stage3"], ["evaluate", "judge"], ["evaluate", "vqa"]]
helps += [["evaluate", name] for name in subjects]
for command in helps:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(open(os.devnull, "w")):
        main([*command, "--help"])
check("a --help", {{"torch", "transformers", "diffusers", "numpy", "PIL", "yaml"}})
from transformers import PreTrainedModel  # imports the Auto classes before it is complete
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor
model, command, *packages = sys.argv[1:]
loaded = [auto.from_pretrained(model) for auto in (AutoConfig, AutoImageProcessor, AutoProcessor)]
assert [type(part).__module__.split(".")[0] for part in loaded] == ["vlv"] * 3, loaded
import vlv.cli.caption
check("vlv caption", {NOT_FOR_CAPTIONS})
import vlv.pipelines.loading
check("the pipelines", {NOT_FOR_LIGHT_USES})
print([importlib.import_module(name).__file__ for name in packages])
sys.argv = [command, "--help"]
runpy.run_path(command, run_name="__main__")
"""
    command = installed.parent / "vlv"
    arguments = [str(ROOT / "checkpoints" / "vlv-miniature"), str(command), *PACKAGES]
    files, _, shown = run(str(installed), "-c", code, *arguments, cwd=tmp_path).partition("\n")
    assert str(ROOT) not in files
    assert files.count("site-packages/vlv") == len(PACKAGES)
    assert "caption" in shown
    assert os.access(command, os.X_OK) and command.read_text().startswith(f"#!{installed}\n")
