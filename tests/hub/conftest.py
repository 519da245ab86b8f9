import pytest
from huggingface_hub import constants

from .server import Hub, serve


@pytest.fixture
def hub_server(monkeypatch):
    """`(hub, its address)`: a Hub server of its own for each test."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # the other tests' setting
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the server speaks LFS alone
    hub = Hub()
    with serve(hub) as endpoint:
        yield hub, endpoint
