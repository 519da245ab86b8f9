"""What a stranger installs works: every package imports from the wheel, outside the checkout, and stays light."""

import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ["vlv", "vlv.hub", "vlv.diffusion_decoder", "vlv.pipelines", "vlv.train", "vlv.evaluation", "vlv.miniature"]
PACKAGES += ["vlv.space", "vlv.cli", "vlv.checkpoints"]


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The Python of an environment that has the wheel and, beside it, only this environment's libraries."""
    folder = tmp_path_factory.mktemp("installed")
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # or setuptools would ship what an earlier build left there
    run(sys.executable, "-m", "build", "--wheel", "--outdir", str(folder / "dist"), str(ROOT), cwd=folder)
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    wheel = next((folder / "dist").glob("*.whl"))
    run(str(python), "-m", "pip", "install", "--no-deps", "--quiet", str(wheel), cwd=folder)
    site = run(str(python), "-c", "import site; print(site.getsitepackages()[0])", cwd=folder).strip()
    libraries = run(sys.executable, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder).strip()
    # Appended, so that the installed vlv comes first; a .pth in that folder (an editable vlv) is not followed.
    (Path(site) / "libraries.pth").write_text(libraries + "\n")
    return python


@pytest.mark.slow
def test_the_wheel_imports_outside_the_checkout(installed, tmp_path):
    code = "import importlib, sys; print([importlib.import_module(n).__file__ for n in sys.argv[1:]])"
    files = run(str(installed), "-c", code, *PACKAGES, cwd=tmp_path)
    assert str(ROOT) not in files
    assert files.count("site-packages/vlv") == len(PACKAGES)


@pytest.mark.slow
def test_the_wheel_has_the_command_and_the_data(installed, tmp_path):
    assert "caption" in run(str(installed.parent / "vlv"), "--help", cwd=tmp_path)
    code = "import os, vlv.train.configs as c; print(*os.listdir(c.__path__[0]))"
    assert {"stage1.yaml", "stage2.yaml"} <= set(run(str(installed), "-c", code, cwd=tmp_path).split())
    code = (
        "from pathlib import Path; from vlv.checkpoints import MINIATURE; from vlv import hub, space; "
        "print((MINIATURE / 'config.json').is_file(), (Path(hub.__file__).parent / 'model_card_template.md').is_file(), "
        "len(list((Path(space.__file__).parent / 'examples').glob('*.png'))) > 3)"
    )
    assert run(str(installed), "-c", code, cwd=tmp_path).split() == ["True"] * 3


def test_the_editable_install_imports_outside_the_checkout(tmp_path):
    code = "import importlib, sys; [importlib.import_module(n) for n in sys.argv[1:]]"
    run(sys.executable, "-c", code, *PACKAGES, cwd=tmp_path)


def test_importing_vlv_is_light(tmp_path):
    code = (
        "import sys, vlv, vlv.pipelines; "
        "heavy = {'datasets', 'gradio', 'matplotlib', 'torchvision', 'torchmetrics'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    run(sys.executable, "-c", code, cwd=tmp_path)


def test_asking_a_command_for_its_help_is_light(tmp_path):
    code = (
        "import contextlib, sys; from vlv.cli.main import main\n"
        "with contextlib.suppress(SystemExit): main(['caption', '--help'])\n"
        "heavy = {'datasets', 'gradio', 'matplotlib', 'torchvision', 'torchmetrics'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    run(sys.executable, "-c", code, cwd=tmp_path)


def test_importing_asks_no_network(tmp_path):
    code = """
import socket, sys
def refuse(*arguments, **settings):
    raise AssertionError("the network was asked at import")
socket.socket.connect = socket.getaddrinfo = refuse
import importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
"""
    run(sys.executable, "-c", code, *PACKAGES, cwd=tmp_path)
