"""`vlv evaluate reconstruction`, `spatial` and `composition` on the embedded miniature; ended runs go on."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlv.checkpoints import MINIATURE
from vlv.cli.main import main
from vlv.evaluation.captioners import open_captioner
from vlv.evaluation.composition import CompositionConfig, MixedSource, other_firsts, read_pairs, recall_figures
from vlv.evaluation.detections import Detected
from vlv.evaluation.features import load_rgb
from vlv.evaluation.generated_images import CaptionSource, EmbeddingSource
from vlv.evaluation.spatial import SpatialConfig
from vlv.miniature.data import SceneDataset, evaluation_items
from vlv.miniature.evaluation import (
    MAX_NEW_TOKENS,
    SCENE_CLASSIFIER_FILE,
    caption_images,
    reconstruct_images,
    teacher_pipeline,
)
from vlv.miniature.paper.embedding_probes import _background_accuracy, _object_recall, deviations
from vlv.miniature.scene_classifier import SceneClassifier
from vlv.miniature.scene_detector import detect_objects
from vlv.miniature.teacher import measure_prompt_alignment
from vlv.pipelines import load_reconstruction

from .openai_server import Reply, scripted_endpoint

COUNT, STEPS = 4, "2"
IMAGES = {f"{number}.png": Path(f"{number}.png") for number in range(COUNT)}
SHORT = ["--model", "miniature", "--num_inference_steps", STEPS, "--bootstrap", "5"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """A folder of rendered scenes of `test`."""
    folder = tmp_path_factory.mktemp("scenes")
    pixels, _ = evaluation_items("test", COUNT)
    for number, image in enumerate(pixels):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def truth():
    return evaluation_items("test", COUNT)


@pytest.fixture(scope="module")
def pipeline():
    pipeline = load_reconstruction(MINIATURE)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(protocol: str, scenes: Path, output: Path, *options: str) -> dict:
    arguments = ["--images", str(scenes), "--output_dir", str(output), *SHORT, *options]
    assert main(["evaluate", protocol, *arguments]) == 0
    return json.loads((output / "results.json").read_text())


def report_page(output: Path) -> str:
    """The report of a run as HTML."""
    assert main(["evaluate", "report", str(output), "--output", str(output / "report.html")]) == 0
    return (output / "report.html").read_text()


def read(files: list[Path]) -> torch.Tensor:
    """Images `(N, 3, H, W)` uint8."""
    return torch.stack([load_rgb(file) for file in files])


def generated(output: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in output.rglob("*.png")}


@pytest.mark.slow
def test_reconstructions_are_measured_at_each_guidance_and_a_run_goes_on(scenes, tmp_path, clip_model, capsys):
    options = ["--guidance", "1", "3", "--pair_metrics", "cosine", "psnr", "--features", "scene-classifier"]
    options += [str(clip_model), "--bootstrap", "0"]
    results = run("reconstruction", scenes, tmp_path, *options)
    assert set(results["metrics"]) == {"1", "3"} and results["num_images"] == COUNT
    assert results["metrics"]["1"] != results["metrics"]["3"] and results["config"]["model"] == "miniature"
    assert results["metrics"]["3"]["cosine"]["value"] > 0.3 and results["versions"]["torch"]
    labels = {key: own["label"] for key, own in results["metrics"]["3"].items()}
    assert labels["frechet_distance"] == "Fréchet distance (scene classifier, 256 features)"
    assert labels["gaussian_mmd_2"] == "CMMD" and labels["cosine_2"] == f"cosine of features (clip: {clip_model})"
    assert labels["psnr"] == "PSNR (dB)" and "psnr_2" not in labels
    table = (tmp_path / "results.md").read_text().strip()
    assert table.startswith("| metric | guidance 1 | guidance 3 |") and table in capsys.readouterr().out
    before = generated(tmp_path)
    assert len(before) == 2 * COUNT
    removed = next(iter(before))
    content = removed.read_bytes()
    removed.unlink()
    assert run("reconstruction", scenes, tmp_path, *options) == results
    after = generated(tmp_path)
    assert removed.read_bytes() == content and {path: after[path] for path in before if path != removed} == {
        path: time for path, time in before.items() if path != removed
    }


@pytest.mark.slow
def test_reconstructions_are_those_of_the_miniatures_evaluation(scenes, truth, pipeline):
    images = {path.name: path for path in sorted(scenes.iterdir())}
    source = EmbeddingSource(images, lambda: pipeline, "miniature")
    settings = {"guidance_scale": 2.0, "num_inference_steps": 2}
    pictures = source.generate(source.names, range(COUNT), **settings)
    expected = reconstruct_images(pipeline, truth[0], 2.0, 2)
    found = torch.stack([to_tensor(picture) for picture in pictures])
    assert torch.equal(found, expected)
    mixed = MixedSource(images, [("0.png", "1.png")], (24, 0), lambda: pipeline, "miniature")
    (alone,) = mixed.generate(["0.png + 1.png"], [0], **settings)
    difference = to_tensor(alone).int() - expected[0].int()
    assert difference.abs().max() <= 1  # of one image and none of the other, in a batch of its own


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """`(3, H, W)` uint8."""
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)


@pytest.mark.slow
def test_captions_and_their_images_are_those_of_the_miniatures_evaluation(scenes, truth, pipeline):
    captioner = open_captioner(str(MINIATURE), max_new_tokens=MAX_NEW_TOKENS)
    captions = [own.caption for own in captioner.caption(sorted(scenes.iterdir()))]
    assert captions == caption_images(captioner.model, captioner.processor, truth[0])
    teacher = teacher_pipeline(pipeline)
    teacher.set_progress_bar_config(disable=True)
    prompt = SceneDataset(1, split="test", seed=29, fields=("caption",))[0]["caption"]
    classifier = SceneClassifier.load(MINIATURE / SCENE_CLASSIFIER_FILE)
    _, expected = measure_prompt_alignment(teacher, classifier, "test", 1, num_inference_steps=2, seed=42)
    source = CaptionSource({"a": prompt}, lambda: teacher, "miniature")
    (image,) = source.generate(["a"], [42], guidance_scale=2.0, num_inference_steps=2)
    assert np.array_equal(np.asarray(image), expected[0])


@pytest.mark.slow
def test_spatial_deviations_are_those_of_the_paper_in_miniature(scenes, truth, tmp_path, capsys):
    results = run("spatial", scenes, tmp_path, "--detector", "scene-classifier", "--num_inference_steps", "6")
    found = {key: own["value"] for key, own in results["metrics"]["2"].items()}
    classifier = SceneClassifier.load(MINIATURE / SCENE_CLASSIFIER_FILE)
    files = sorted(tmp_path.rglob("guidance-2/*.png"))
    images = read(files)
    expected = deviations(truth[0], images, truth[1], classifier.predict_scenes(images))
    assert expected["matched"] == found["matched"] == 1  # so that the two rules of matching find the same pairs
    assert found["distance"] == pytest.approx(expected["centre"], abs=1e-4) and found["distance"] > 0
    assert found["scale"] == pytest.approx(expected["scale"], abs=1e-4) and "angle" not in found
    assert results["detector"] == "scene classifier" and "paper" not in capsys.readouterr().out


@pytest.mark.slow
def test_an_endpoint_finds_the_objects_and_the_papers_figures_stand_beside(scenes, tmp_path, capsys):
    def box(x: float, angle: float) -> str:
        return json.dumps([{"label": "cat", "box_3d": [x, 0, 0, 1, 1, 1, angle, 0, 0]}])

    def answer(words: str, before: int) -> Reply:  # the originals, then their reconstructions, of which one fails
        if before < COUNT:
            return Reply(box(0, 0))
        return Reply("nothing" if before == 2 * COUNT - 1 else box(0.3, 90))

    with scripted_endpoint(answer) as script:
        options = ["--detector", f"{script.url}#m", "--concurrency", "1", "--max_retries", "0", "--guidance", "2"]
        options += ["--paper", "table6/40m"]
        results = run("spatial", scenes, tmp_path, *options)
        assert len(script.requests) == 2 * COUNT
    metrics = {key: own["value"] for key, own in results["metrics"]["2"].items()}
    assert metrics["centre"] == pytest.approx(0.1, abs=1e-6) and metrics["scale"] == 0 and metrics["matched"] == 1
    assert metrics["angle"] == pytest.approx(math.pi / 6, abs=1e-6)
    assert list(results["failed"]["2"]) == ["3.png"] and results["metrics"]["2"]["centre"]["num_objects"] == 3
    assert results["per_image"]["2"]["centre"] == {f"{number}.png": pytest.approx(0.1) for number in range(3)}
    assert set(results["per_image"]["2"]["matched"].values()) == {1} and report_page(tmp_path).count("<img") == 6
    output = capsys.readouterr().out
    assert (
        "| angle (L1) of the paper's VLV after 40 million images (Table 6), guidance not stated | 0.1016 |" in output
    )
    assert "note: 1 of 4 images are left out: a detection failed" in output


@pytest.mark.slow
def test_compositions_are_compared_by_features_objects_and_a_judge(scenes, truth, tmp_path, capsys):
    with scripted_endpoint(lambda words, before: Reply("Score: 4" if before % 2 else "Score: 9")) as script:
        options = ["--counts", "24+0", "12+12", "--detector", "scene-classifier", "--features", "scene-classifier"]
        options += ["--judge", f"{script.url}#m", "--concurrency", "1"]
        results = run("composition", scenes, tmp_path, *options)
        assert len(script.requests) == 2 * 2 * COUNT // 2
    alone, mixed = results["metrics"]["24+0"], results["metrics"]["12+12"]
    assert alone["cosine_first"]["value"] > mixed["cosine_first"]["value"] > alone["cosine_second"]["value"]
    assert (alone["score_first"]["value"], alone["score_first"]["num_images"]) == (4, 1)
    assert len(results["failed"]["24+0"]) == 2 and "24+0: 2 scores of 4 are missing" in results["notes"]
    assert results["num_pairs"] == 2 and "| 12+12 |" in capsys.readouterr().out
    each = results["per_image"]["24+0"]
    assert [len(each[key]) for key in ("cosine_first", "cosine_second")] == [2, 2]
    assert sum(each["score_first"].values()) == 4 and len(each["score_first"]) == 1
    html = report_page(tmp_path)
    assert html.count("<img") == 2 * (2 + len(results["files"]))  # of each pair, its images and the mixed ones
    assert "first" in html and "second" in html


def test_what_a_composition_shows_is_counted_as_in_the_paper_in_miniature(truth):
    def detect(scenes, images) -> list[Detected]:
        return [Detected(detect_objects(image, scene)) for image, scene in zip(images, scenes, strict=True)]

    images, scenes = truth
    found = detect(scenes, images)
    order = [0, 2, 1, 3]
    others = [scenes[row] for row in order]  # what the second image of each pair shows
    figures = recall_figures(found, [found, detect(others, images[order])], samples=0)
    values = {key: own["value"] for key, own in figures.items()}
    assert values["object_first"] == _object_recall(scenes, scenes) == 1
    assert values["object_second"] == pytest.approx(_object_recall(scenes, others), abs=1e-3)
    assert 0 < values["object_second"] < 1
    assert values["background_second"] == pytest.approx(_background_accuracy(scenes, others), abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"counts": ["12"]}, "counts are numbers of embeddings of two images, such as 39\\+38, not '12'"),
        ({"counts": ["0+0"]}, "not '0\\+0'"),
        ({"counts": []}, "counts is missing"),
        ({"features": None}, "set features, detector or judge"),
        ({"detector": "http://127.0.0.1/v1#m"}, "detector is an endpoint; set judge"),
        ({"judge": "http://127.0.0.1/v1"}, "names no model"),
        ({"judge": "http://127.0.0.1/v1#m", "max_price": 1.0}, "max_price needs price_in and price_out"),
        ({"dtype": "int8"}, "dtype is one of float32, bfloat16, float16, not 'int8'"),
        ({"limit": 0}, "limit must be at least 1, not 0"),
    ],
)
def test_wrong_settings_of_a_composition_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        composition_config(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"boxes": "4d"}, "boxes is one of 3d, 2d, not '4d'"),
        ({"paper": "table6/40m"}, "figures are of boxes in three dimensions by an endpoint"),
        ({"threshold": 1.0}, "threshold must be at least 0 and below 1, not 1.0"),
        ({"detector": ""}, "detector is missing: what finds the objects"),
        ({"detector": "http://127.0.0.1/v1"}, "names no model"),
    ],
)
def test_wrong_settings_of_spatial_deviation_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SpatialConfig(**{"images": "i", "model": "m", "output_dir": "o", "detector": "d", **settings})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "cannot be read as JSON"),
        ('{"a": 1}', "must hold \\[\\[image, image\\], ...\\]"),
        ('[["0.png"]]', "must hold"),
        ("[]", "must hold"),
        ('[["0.png", "9.png"]]', "has no '9.png', which pairs"),
        ('[["0.png", "1"], ["2.png", "1"], ["0.png", "1"]]', r"has \['0.png', '1.png'\] 2 times"),
    ],
)
def test_a_wrong_file_of_pairs_is_named(tmp_path, content, message):
    (tmp_path / "pairs.json").write_text(content)
    config = composition_config(pairs=str(tmp_path / "pairs.json"))
    with pytest.raises(ValueError, match=message):
        read_pairs(config, IMAGES)


def test_pairs_are_those_of_the_file_or_of_both_halves(tmp_path):
    assert read_pairs(composition_config(), IMAGES) == [("0.png", "2.png"), ("1.png", "3.png")]
    (tmp_path / "pairs.json").write_text('[["0", "3.jpg"], ["3.jpg", "1.png"]]')
    config = composition_config(pairs=str(tmp_path / "pairs.json"))
    assert read_pairs(config, IMAGES) == [("0.png", "3.png"), ("3.png", "1.png")]
    with pytest.raises(ValueError, match="has 1 images; a composition needs at least 2"):
        read_pairs(composition_config(limit=1), IMAGES)


def test_pairs_with_one_name_are_refused():
    images = [("a", "b + c"), ("a + b", "c")]
    with pytest.raises(ValueError, match="two pairs of images have the name 'a \\+ b \\+ c'"):
        MixedSource({}, images, (1, 1), lambda: None, "m")


def test_the_level_of_chance_is_an_image_that_a_pair_does_not_show():
    assert other_firsts([(0, 1), (0, 2), (3, 1), (4, 5)]) == [4, 3, 4, 0]
    assert other_firsts([(0, 1), (0, 2)]) is None and other_firsts([(0, 1)]) is None


def composition_config(**settings) -> CompositionConfig:
    given = {"images": "i", "model": "m", "output_dir": "o", "counts": ["1+1"], "features": "f"}
    return CompositionConfig(**{**given, **settings})
