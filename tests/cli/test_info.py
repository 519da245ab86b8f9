"""`vlv info` describes a checkpoint and downloads no weights."""

import json

import pytest
from huggingface_hub import constants
from safetensors import safe_open

from vlv.checkpoints import MINIATURE
from vlv.cli.main import main

from ..builders import GOLDEN
from ..hub.machine import Machine
from ..hub.server import Hub, serve


def info(capsys, *arguments) -> dict:
    assert main(["info", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def parameters(found: dict) -> dict[str, int]:
    return {part["name"]: part["parameters"] for part in found["parts"]}


def test_the_miniature(capsys):
    found = info(capsys, MINIATURE)
    assert found["kind"] == "stage 2: captions and reconstructions"
    assert (
        found["family"] == "Stable Diffusion 1.x or 2.x (UNet2DConditionModel, DDIMScheduler, predicts v_prediction)"
    )
    assert found["licences"] == {"this model": "cc-by-sa-4.0"}
    assert found["files"]["config.json"] == (MINIATURE / "config.json").stat().st_size
    with safe_open(MINIATURE / "unet" / "diffusion_pytorch_model.safetensors", "pt") as tensors:
        unet = sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118
    assert parameters(found)["denoiser"] == unet
    assert all(set(part["dtypes"]) <= {"float16", "int64"} for part in found["parts"])
    assert sum(part["bytes"] for part in found["parts"]) < sum(found["files"].values())


def test_the_text_output(capsys):
    assert main(["info", str(MINIATURE)]) == 0
    said = capsys.readouterr().out
    assert "caption embeddings: 24 x 128" in said and "denoiser" in said and "captioner.safetensors" in said


@pytest.mark.slow
def test_a_repository_is_described_without_its_weights(tmp_path):
    hub = Hub()
    with serve(hub) as endpoint:
        machine = Machine(tmp_path / "machine", endpoint)
        hub.add_folder("org/vlv", MINIATURE)
        done = machine.vlv("info", "org/vlv", "--json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert parameters(found)["language model"] > 100_000
        assert found["files"]["captioner.safetensors"] == (MINIATURE / "captioner.safetensors").stat().st_size
        assert sum(hub.downloads.values()) < 1_000_000  # headers, not weights
        done = machine.vlv("info", "org/none")
        assert done.returncode == 2 and "cannot load org/none" in done.stderr
    done = machine.vlv("info", "org/vlv")  # the server is gone
    assert done.returncode == 0, done.stderr
    assert "only what is in the cache: " in done.stdout and "caption embeddings: 24 x 128" in done.stdout


def test_both_encoders_of_a_converted_checkpoint(converted, capsys):
    found = info(capsys, converted)
    assert "image encoder" in parameters(found) and "image encoder, the captioner's own" in parameters(found)


@pytest.mark.parametrize(
    ("path", "kind", "parts"),
    [
        ("stage1", "the authors' stage 1: reconstructions", {"denoiser", "autoencoder"}),
        ("stage2/model.pt", "the authors' stage 2: captions", {"language model", "language projection"}),
    ],
)
def test_checkpoints_of_the_authors_code(path, kind, parts, capsys):
    found = info(capsys, GOLDEN / path)
    assert found["kind"] == kind and found["properties"] == {"query tokens": "77 x 64"}
    shared = {"image encoder", "query tokens and projector", "text encoder"}
    assert set(parameters(found)) == parts | shared


def test_another_model_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for source in (tmp_path, tmp_path / "none", GOLDEN / "components" / "qwen"):
        assert main(["info", str(source)]) == 2
        assert "cannot load" in capsys.readouterr().err
