"""`vlv caption --engine ray`. `tests/cli/kill_ray_worker.py` kills a worker."""

from importlib.util import find_spec

import pytest

from vlv.cli.main import main

from .kill_captioning import shards_in


def caption(folder, output, model, *options) -> int:
    settings = ["--shards", "2", "--output-dir", str(output), "--model", str(model), "--max-new-tokens", "4"]
    return main(["caption", str(folder), *settings, "--device", "cpu", *options])


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="the extra [ray] is not installed")
def test_actors_write_the_shards_of_one_process(image_folder, model_folder, tmp_path):
    assert caption(image_folder, tmp_path / "ray", model_folder, "--engine", "ray", "--ray-actors", "2") == 0
    assert caption(image_folder, tmp_path / "alone", model_folder) == 0
    assert shards_in(tmp_path / "ray") == shards_in(tmp_path / "alone") and len(shards_in(tmp_path / "ray")) == 2


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_the_engine_names_the_extra(image_folder, model_folder, tmp_path, capsys):
    assert caption(image_folder, tmp_path / "ray", model_folder, "--engine", "ray") == 2
    assert "--engine ray needs the extra vlv[ray]" in capsys.readouterr().err
