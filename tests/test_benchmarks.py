"""The benchmarks run at small size on a CPU; their settings exist."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from vlv.preparation.filter import filter_metadata
from vlv.preparation.rules import Rules
from vlv.train import Stage1Config, Stage2Config

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gpu():
    return load("gpu")


@pytest.mark.parametrize(("stage", "config"), [(1, Stage1Config), (2, Stage2Config)])
def test_every_setting_of_the_ladder_exists(gpu, stage, config):
    known = {field.name for field in dataclasses.fields(config)}
    named = [(step["name"], name) for step in gpu.LADDERS[stage] for name in step["settings"]]
    assert not [step for step in named if step[1] not in known]


def test_the_metadata_of_the_filters_benchmark_have_rows_that_pass_and_rows_that_do_not(tmp_path):
    load("bulk_filter").make_metadata(tmp_path / "metadata.parquet", 500, seed=0)
    counts = filter_metadata([tmp_path / "metadata.parquet"], tmp_path / "out.parquet", Rules())
    assert counts["rows"] == 500 and 50 < counts["written"] < 200 and counts["rules"]["watermark"]["missing"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_that_fails_says_why_and_the_next_one_starts_without_it(gpu, stage):
    ladder = [
        {"name": "fails", "settings": {"trainable": "nothing"}},
        {"name": "works", "settings": {"trainable": "projector"}},
    ]
    rows = list(gpu.climb(stage, gpu.small_size(), "cpu", 1, ladder))
    assert "trainable is 'nothing'" in rows[0]["problem"]
    assert "problem" not in rows[1] and rows[1]["images_per_second"] > 0 and rows[1]["tflops"] > 0


@pytest.mark.slow
def test_captions_and_reconstructions_are_timed(gpu):
    size = dataclasses.replace(gpu.small_size(), caption_tokens=4, inference_batch=1)
    caption, reconstruction = gpu.measure_caption(size, "cpu"), gpu.measure_reconstruction(size, "cpu")
    assert caption["tokens_per_second"] == pytest.approx(4 * caption["images_per_second"])
    assert reconstruction["images_per_second"] > 0


def test_the_table_names_the_card_and_what_ran_out_of_memory(gpu):
    rows = [
        {"name": "float32", "settings": {}, "problem": "out of memory"},
        {"name": "bfloat16", "settings": {}, "images_per_second": 20.04, "seconds": 1.0, "tflops": 80.0}
        | {"utilization": 0.25, "memory_gb": 61.24},
    ]
    found = {
        "machine": {"device": "NVIDIA H100", "torch": "2.13", "driver": "570"},
        "size": "full",
        "batches": {"stage 1": 32, "inference": 16},
        "caption_tokens": 300,
        "inference_steps": 30,
        "training": {"stage 1": rows},
        "inference": {
            "caption": {"images_per_second": 2.0, "tokens_per_second": 600.0, "seconds": 8.0, "memory_gb": 10.0},
            "reconstruction": {"problem": "out of memory"},
        },
    }
    text = gpu.as_markdown(found)
    assert "NVIDIA H100, torch 2.13, driver 570" in text
    assert "| float32 | out of memory |" in text and "| bfloat16 | 20.0 | 80 | 25% | 61.2 |" in text
    assert "| caption of 300 tokens, greedy | 2.00 | 600 | 10.0 |" in text
