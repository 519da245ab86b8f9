"""`vlv evaluate cycle`: captions to images to figures with a small text-to-image model; an ended run goes on."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPImageProcessorPil

from vlv.cli.evaluating import load_text_to_image
from vlv.cli.main import main
from vlv.errors import UserError
from vlv.evaluation.captioners import open_captioner
from vlv.evaluation.cycle import CycleConfig, run_cycle
from vlv.evaluation.detections import PipelineDetector
from vlv.evaluation.features import AutoModelFeatures
from vlv.evaluation.generated_images import ImageStore, image_store, tokenizers_that_cut
from vlv.evaluation.guidance_scales import guidance_table
from vlv.evaluation.published import published_notes

from .openai_server import Reply, scripted_endpoint


@pytest.fixture
def config(tmp_path, images, stable_diffusion, dinov2_model) -> dict:
    folder = tmp_path / "originals"
    folder.mkdir()
    for number, image in enumerate(images[:3]):
        image.save(folder / f"{number}.jpg")
    captions = {"0.png": "a small dog", "1.png": "", "2.png": "a cat " * 9}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    return {
        "captions": str(tmp_path / "captions.json"),
        "images": str(folder),
        "text_to_image": str(stable_diffusion),
        "output_dir": str(tmp_path / "cycle"),
        "features": [str(dinov2_model)],
        "guidance": [1, 4],
        "num_inference_steps": 2,
        "batch_size": 2,
        "bootstrap": 5,
        "pair_metrics": ["cosine"],
    }


def run(config: dict, folder: Path, *options: str) -> int:
    (folder / "cycle.yaml").write_text(yaml.safe_dump(config))
    return main(["evaluate", "cycle", str(folder / "cycle.yaml"), *options])


def generated(config: dict) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(config["output_dir"]).rglob("*.png")}


@pytest.mark.slow
def test_a_cycle_measures_each_guidance_and_goes_on_where_it_ended(config, tmp_path, capsys):
    assert run(config, tmp_path) == 0
    results = json.loads((tmp_path / "cycle" / "results.json").read_text())
    assert set(results["metrics"]) == {"1", "4"} and results["num_images"] == 3
    assert {"frechet_distance", "gaussian_mmd", "cosine"} <= set(results["metrics"]["1"])
    cut = "tokenizer (12 tokens) of the text-to-image model cut 1 of 3 captions: their ends are not in the images"
    assert results["notes"].count(cut) == 1
    assert results["notes"].count("1 of 3 captions are empty, such as that of '1.png'; they count") == 1
    assert (results["empty_captions"], results["cut_captions"]) == (["1.png"], [])
    assert results["metrics"]["1"] != results["metrics"]["4"] and results["config"]["seed"] == 42
    table = (tmp_path / "cycle" / "results.md").read_text()
    assert table.startswith("| metric | guidance 1 | guidance 4 |") and table.strip() in capsys.readouterr().out
    first = generated(config)
    assert len(first) == 6
    removed = next(iter(first))
    kept = {path: path.stat().st_mtime_ns for path in first if path != removed}
    removed.unlink()
    assert run(config, tmp_path) == 0
    assert generated(config) == first  # the removed image is generated again, alone in its batch
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert json.loads((tmp_path / "cycle" / "results.json").read_text()) == results
    captions = json.loads(Path(config["captions"]).read_text())
    Path(config["captions"]).write_text(json.dumps(dict(list(captions.items())[:2])))
    assert run(config, tmp_path) == 0  # of fewer images
    fewer = json.loads((tmp_path / "cycle" / "results.json").read_text())
    assert fewer["num_images"] == 2 and not any(" cut " in note for note in fewer["notes"])


@pytest.mark.slow
def test_an_interrupted_run_leaves_complete_results_as_they_are(config, stable_diffusion, dinov2_model):
    folder = Path(config["output_dir"])
    folder.mkdir()
    (folder / "results.json").write_text("complete")
    calls = []

    def advance(images: int) -> None:
        calls.append(images)
        if len(calls) == 4:  # after both batches of the first guidance scale
            raise KeyboardInterrupt

    def run_it(**settings) -> None:
        captions = dict.fromkeys(("0.jpg", "1.jpg", "2.jpg"), "a cat")
        images = {name: Path(config["images"]) / name for name in captions}
        features = [AutoModelFeatures(str(dinov2_model))]
        run_cycle(
            CycleConfig(**config),
            captions,
            images,
            lambda: load_text_to_image(str(stable_diffusion), None, "cpu"),
            "model",
            features,
            **settings,
        )

    with pytest.raises(KeyboardInterrupt):
        run_it(advance=advance)
    assert (folder / "results.json").read_text() == "complete"
    assert set(json.loads((folder / "results-partial.json").read_text())["metrics"]) == {"1"}
    run_it()
    assert set(json.loads((folder / "results.json").read_text())["metrics"]) == {"1", "4"}
    assert not (folder / "results-partial.json").exists()


def test_images_of_other_captions_seeds_and_models_have_other_files(config, tmp_path):
    store = ImageStore(tmp_path, CycleConfig(**config))
    other = ImageStore(tmp_path, CycleConfig(**config, seed=7))
    paths = {
        store.path("a.png", "a dog", 1),
        store.path("a.png", "a cat", 1),
        store.path("x/a.png", "a dog", 1),
        store.path("a.png", "a dog", 2),
        other.path("a.png", "a dog", 1),
    }
    assert len(paths) == 5
    assert store.noise_seed("a.png") == store.noise_seed("a.png") != store.noise_seed("b.png")
    assert store.noise_seed("a.png") != other.noise_seed("a.png")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"features": []}, "features must be one or more different ones"),
        ({"features": ["a", "a"]}, "features must be one or more different ones, not \\['a', 'a'\\]"),
        ({"captions": None}, "set captions, a file, or captioner, what writes them, and not both"),
        ({"captioner": "m"}, "set captions, a file, or captioner, what writes them, and not both"),
        ({"captions": None, "captioner": "http://127.0.0.1/v1"}, "names no model"),
        ({"captions": None, "captioner": "m", "captioner_kind": "vllm"}, "captioner_kind is one of vlv, pipeline"),
        ({"paper": "table5/40m"}, "paper is one of table1/original, .*, not 'table5/40m'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"images": ""}, "images is missing: folder of the original images"),
        ({"guidance": []}, "guidance must be one or more scales"),
        ({"guidance": "strong"}, "guidance must be one or more scales of at least 0, not .'strong'."),
        ({"guidance": [float("nan")]}, "guidance must be one or more scales"),
        ({"bootstrap": -1}, "bootstrap must be at least 0, not -1"),
        ({"pair_metrics": "fid"}, "pair_metrics are psnr, ssim, cosine, lpips, dreamsim, scenes, not fid"),
        ({"pair_metrics": ["fid"]}, "pair_metrics are psnr, ssim, cosine, lpips, dreamsim, scenes, not fid"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1"),
        ({"noise": "seed"}, "noise is one of name, position, not 'seed'"),
        ({"scheduler": "dpm"}, r"scheduler is one of ddpm, ddim, .*, own, not 'dpm'"),
    ],
)
def test_wrong_settings_are_named(config, changed, message):
    with pytest.raises(ValueError, match=message):
        CycleConfig(**{**config, **changed})


def test_noise_by_position_counts_from_the_seed_and_has_files_of_its_own(config, tmp_path):
    names = ["a.png", "b.png"]
    store = ImageStore(tmp_path, CycleConfig(**config, noise="position", seed=5), names)
    moved = ImageStore(tmp_path, CycleConfig(**config, noise="position", seed=5), names[::-1])
    assert [store.noise_seed(name) for name in names] == [5, 6]
    by_name = ImageStore(tmp_path, CycleConfig(**config, seed=5))
    assert len({own.path("a.png", "a dog", 1) for own in (store, moved, by_name)}) == 3


def test_images_of_another_scheduler_are_in_another_folder(config):
    stores = [image_store(CycleConfig(**config, scheduler=name), "model") for name in ("own", "dpm++", "ddim")]
    folders = [store.folder for store in stores]
    assert len(set(folders)) == 3 and folders[0] == image_store(CycleConfig(**config), "model").folder


def test_a_single_value_stands_for_a_list(config):
    found = CycleConfig(**{**config, "guidance": 2, "pair_metrics": "ssim"})
    assert found.guidance == [2.0] and found.pair_metrics == ["ssim"]


@pytest.mark.skipif(importlib.util.find_spec("lpips") is not None, reason="lpips is installed")
def test_a_missing_package_is_named_before_images_are_generated(config, tmp_path, capsys):
    assert run({**config, "pair_metrics": "lpips"}, tmp_path) == 2
    assert "pip install lpips" in capsys.readouterr().err and not generated(config)


def test_scenes_need_features_that_read_them_before_images_are_generated(config, tmp_path, capsys):
    assert run({**config, "pair_metrics": "scenes"}, tmp_path) == 2
    assert "the pair metric scenes needs the features scene-classifier" in capsys.readouterr().err
    assert not generated(config)


def test_long_names_have_files_whose_names_are_short_enough(config, tmp_path):
    name = ImageStore(tmp_path, CycleConfig(**config)).path(f"{'猫' * 80}.png", "a cat", 1).name
    assert name.startswith("猫" * 33 + "-") and len(name.encode()) < 255


def test_t5_reads_as_many_tokens_as_the_pipeline_passes_to_it(stable_diffusion_3):
    pipeline = DiffusionPipeline.from_pretrained(stable_diffusion_3)
    pipeline.tokenizer_3.model_max_length = 512
    words = {256: "a " * 254, 257: "a " * 300}  # between the words that begin and end a text
    clips = ["tokenizer (12 tokens)", "tokenizer_2 (12 tokens)"]
    assert tokenizers_that_cut(pipeline, "a cat") == []
    assert tokenizers_that_cut(pipeline, words[256]) == clips
    assert tokenizers_that_cut(pipeline, words[257]) == [*clips, "tokenizer_3 (256 tokens)"]


@pytest.mark.slow
def test_a_text_to_image_model_has_no_safety_checker_and_weights_in_safetensors(stable_diffusion, tmp_path):
    folder = tmp_path / "checked"
    pipeline = DiffusionPipeline.from_pretrained(stable_diffusion)
    towers = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = {**towers, "image_size": 32, "patch_size": 16}
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=towers, vision_config=vision, projection_dim=8))
    pipeline.register_modules(safety_checker=checker, feature_extractor=CLIPImageProcessorPil())
    pipeline.save_pretrained(folder)
    assert DiffusionPipeline.load_config(folder)["safety_checker"][1] == "StableDiffusionSafetyChecker"
    assert load_text_to_image(str(folder), torch.float32, "cpu").safety_checker is None
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(UserError, match="safetensors"):
        load_text_to_image(str(folder), torch.float32, "cpu")


@pytest.mark.parametrize("kind", ["captioner", "detector"])
def test_captioners_and_detectors_of_transformers_have_weights_in_safetensors(kind, llava, object_detector, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(llava if kind == "captioner" else object_detector, folder)
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises((OSError, ValueError), match="safetensors"):
        open_captioner(str(folder)) if kind == "captioner" else PipelineDetector(str(folder))


def test_an_unknown_setting_or_a_missing_original_is_named(config, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run({**config, "guidanse": [1]}, tmp_path)
    assert "guidanse" in capsys.readouterr().err
    (tmp_path / "originals" / "0.jpg").unlink()
    assert run(config, tmp_path) == 2
    assert "has no entry for 1 of 3 images: '0.png'" in capsys.readouterr().err


def test_the_papers_row_that_a_setting_names_is_beside_ours_only_for_inceptions_features():
    figures = {"1": {"frechet_distance": {"label": "FID", "value": 12.0}}, "1.5": {}}
    results = {"metrics": figures, "config": {"paper": "table1/gpt-4o"}}
    lines = guidance_table(results).splitlines()
    assert lines[2:] == ["| FID | 12 |  |", "| FID of the paper's GPT-4o (Table 1) | 12.16 |  |"]
    assert "paper" not in guidance_table({"metrics": figures, "config": {"paper": None}})
    table = guidance_table({"metrics": figures, "config": {"paper": "table4/77"}})
    assert "| FID of the paper's VLV with 77 queries (Table 4), guidance not stated | 5.3 |  |" in table
    figures["1"]["frechet_distance"]["label"] = "Fréchet distance"
    assert "paper" not in guidance_table(results)


def test_what_is_not_alike_in_the_papers_row_is_noted():
    config = {"paper": "table1/vlv", "resize": "pytorch-fid"}
    assert published_notes(config, 30_000, ["FID"]) == published_notes({"paper": None}, 3, ["FID"]) == []
    assert published_notes(config, 3, ["CMMD"]) == ["the run has no figure FID, which the paper's table1/vlv has"]
    few, resized = published_notes({**config, "resize": "clean-fid"}, 3, ["FID"])
    assert "table1/vlv is of 30000 images, this run of 3" in few and "this run's as clean-fid" in resized


@pytest.mark.slow
def test_a_model_of_transformers_captions_the_images_once(config, tmp_path, llava, capsys):
    del config["captions"]
    config |= {"captioner": str(llava), "max_new_tokens": 5, "guidance": 1, "limit": 2}
    assert run(config, tmp_path) == 0
    results = json.loads((tmp_path / "cycle" / "results.json").read_text())
    captions = json.loads((tmp_path / "cycle" / "captions.json").read_text())
    expected = {own.name: own.caption for own in open_captioner(str(llava), max_new_tokens=5).caption(paths(config))}
    assert captions == expected and set(captions) == {"0.jpg", "1.jpg"} and results["num_images"] == 2
    assert results["captioner"]["kind"] == "pipeline" and results["captioner"]["failed"] == {}
    log = (tmp_path / "cycle" / "captions.jsonl").read_text()
    first = generated(config)
    assert run(config, tmp_path) == 0 and generated(config) == first
    assert (tmp_path / "cycle" / "captions.jsonl").read_text() == log  # nothing is captioned again


def paths(config: dict) -> list[Path]:
    return sorted(Path(config["images"]).iterdir())[:2]


@pytest.mark.slow
def test_an_endpoint_captions_the_images_and_what_fails_is_named_and_asked_again(config, tmp_path, capsys):
    replies = [Reply("a small dog"), Reply(status=400, body=b"{}"), Reply("", finish_reason="length"), Reply("a cat")]
    captions = config.pop("captions")
    with scripted_endpoint(lambda words, before: replies[before]) as script:
        config |= {"captioner": f"{script.url}#m", "prompt": "What?", "guidance": 1, "max_retries": 0}
        assert run({**config, "concurrency": 1}, tmp_path) == 0
        results = json.loads((tmp_path / "cycle" / "results.json").read_text())
        assert results["num_images"] == 2 and list(results["captioner"]["failed"]) == ["1.jpg"]
        assert "1 of 3 images have no caption and are left out: 1.jpg: status 400" in results["notes"][0]
        assert "note: 1 of 3 images have no caption" in capsys.readouterr().out
        assert run({**config, "concurrency": 1}, tmp_path) == 0
        assert len(script.requests) == 4
    again = json.loads((tmp_path / "cycle" / "captions.json").read_text())
    assert again == {"0.jpg": "a small dog", "1.jpg": "a cat", "2.jpg": ""}
    # The same captions from a file give the same figures.
    Path(captions).write_text(json.dumps(again))
    results = json.loads((tmp_path / "cycle" / "results.json").read_text())
    assert results["empty_captions"] == results["cut_captions"] == ["2.jpg"] and len(results["notes"]) >= 2
    for name in ("captioner", "prompt", "max_retries"):
        del config[name]
    assert run({**config, "captions": captions}, tmp_path) == 0
    assert json.loads((tmp_path / "cycle" / "results.json").read_text())["metrics"] == results["metrics"]
    dead = ["--captioner", "http://127.0.0.1:9/v1#m", "--output_dir", str(tmp_path / "other"), "--max_retries", "0"]
    assert run(config, tmp_path, *dead) == 2
    assert "captioned no image; the first reason: Connection error" in capsys.readouterr().err
