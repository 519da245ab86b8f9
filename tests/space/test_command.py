"""`vlv demo` on this machine: its port, its model, and its end."""

import os
import re
import shutil
import signal
import socket
import sys
import time

import pytest

from vlv.checkpoints import MINIATURE
from vlv.cli.main import main

from ..interpreter import PythonProcess


@pytest.fixture
def busy_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_busy_port_is_one_line_before_the_model_is_loaded(busy_port, capsys):
    assert main(["demo", "--port", str(busy_port)]) == 2
    assert capsys.readouterr().err == f"vlv: port {busy_port} is in use; pass --port\n"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux listens on 127.0.0.2 without set-up")
def test_a_port_that_only_gradio_finds_busy_is_one_line(busy_port, capsys):
    assert main(["demo", "--model", str(MINIATURE), "--host", "127.0.0.2", "--port", str(busy_port)]) == 2
    assert f"vlv: port {busy_port} is in use; pass --port\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (["--port", "70000"], "--port 70000 is not a port; pass a number from 0 to 65535"),
        (["--port", "-1"], "--port -1 is not a port; pass a number from 0 to 65535"),
        (["--host", "256.0.0.1", "--port", "0"], "cannot listen on --host 256.0.0.1 --port 0: "),
    ],
)
def test_an_address_that_cannot_be_used_is_one_line(address, message, capsys):
    assert main(["demo", *address]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"vlv: {message}") and error.count("\n") == 1


def test_a_space_takes_no_scheduler(tmp_path, capsys):
    command = ["demo", "--model", "org/name", "--write-space", str(tmp_path / "space"), "--scheduler", "dpm++"]
    assert main(command) == 2
    assert "a Space takes the model's own scheduler" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_scheduler_that_does_not_fit_is_named_before_the_page_is_served(capsys):
    assert main(["demo", "--model", str(MINIATURE), "--port", "0", "--scheduler", "heun"]) == 2
    assert "--scheduler: the scheduler 'heun' does not fit" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content"),
    [
        (None, None),
        ("config.json", b"[]"),
        ("tokenizer.json", b"{}"),
        ("captioner.safetensors", b""),
        ("unet/diffusion_pytorch_model.safetensors", b""),
        ("model_index.json", b"{}"),
    ],
    ids=str,
)
def test_a_model_that_cannot_be_loaded_is_one_line(name, content, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("vlv.space.app.launch", lambda *args, **kwargs: pytest.fail("the page is served"))
    model = tmp_path / "model"
    if name is None:
        model.mkdir()
    else:
        shutil.copytree(MINIATURE, model)
        (model / name).write_bytes(content)
    assert main(["demo", "--port", "0", "--model", str(model)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "Loading weights" not in line]
    assert len(lines) == 1 and lines[0].startswith(f"vlv: cannot load {model}: ")
    assert name is None or name.split("/")[0] in lines[0].removeprefix(f"vlv: cannot load {model}: ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "code"), [("no --model given", 130), ("http://", 0)], ids=["while it loads", "while it serves"]
)
def test_ctrl_c_ends_it_quietly(moment, code, tmp_path):
    log = tmp_path / "log"
    log.touch()
    server = PythonProcess(
        "import sys; from vlv.cli.main import main; sys.exit(main())",
        ["demo", "--port", "0"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "GRADIO_ANALYTICS_ENABLED": "False"},
        stdout=log,
        stderr=log,
    )
    try:
        while moment not in log.read_text():
            assert server.poll() is None, log.read_text()
            time.sleep(0.02)
        printed = log.read_text()
        server.send_signal(signal.SIGINT)
        assert server.wait() == code
    finally:
        server.kill_group()
    rest = log.read_text()[len(printed.rpartition("\n")[0]) :]
    lines = [line for line in rest.splitlines() if moment not in line]
    assert not re.sub(r"Loading weights[^\n\r]*", "", "\n".join(lines)).strip()
