import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from vlv import VLVForConditionalGeneration
from vlv import hub as vlv_hub

from ..builders import language_model_config, vlv_config, with_text_encoder
from .server import Hub, serve


@pytest.fixture
def hub_server(monkeypatch):
    """`(hub, its address)`: a new Hub server for each test."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # offline by default in the tests
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the server implements LFS alone
    hub = Hub()
    with serve(hub) as endpoint:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield hub, endpoint


@pytest.fixture(scope="session")
def image_file(tmp_path_factory, images) -> Path:
    path = tmp_path_factory.mktemp("image") / "image.png"
    images[1].save(path)
    return path


@pytest.fixture(scope="session")
def model(tmp_path_factory, processor, stable_diffusion) -> Path:
    """An untrained VLV model with captioner and diffusion model, in the Hub layout."""
    torch.manual_seed(0)
    captioner = VLVForConditionalGeneration(vlv_config(text_config=language_model_config())).eval()
    with_text_encoder(captioner.model)
    folder = tmp_path_factory.mktemp("model")
    vlv_hub.export(folder, captioner=captioner, processor=processor, diffusion_model=stable_diffusion)
    (folder / vlv_hub.TRAINING_FILE).write_text(
        json.dumps(
            {"stage1": {"images": "org/images", "image_encoder": "florence-community/Florence-2-base", "steps": 3}}
        )
    )
    return folder
