import pytest

from .process import start_server


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    running = start_server(tmp_path_factory.mktemp("server") / "log", "--max-body-mb", "2", "--max-pixels", "4000000")
    yield running
    running.process.kill_group()
