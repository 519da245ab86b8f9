"""The endpoint that knows scenes judges captions, answers questions and finds objects by the truth."""

import json
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from vlv.checkpoints import MINIATURE
from vlv.cli.main import main
from vlv.evaluation.spatial import spatial_figures
from vlv.miniature.evaluation import SCENE_CLASSIFIER_FILE
from vlv.miniature.grammar import write_caption
from vlv.miniature.pairs import write_pairs
from vlv.miniature.scene_detector import SceneDetector
from vlv.miniature.scene_endpoint import MODEL, score_caption, score_content, serve_scenes
from vlv.miniature.scene_questions import answer_question, ask_about, write_questions
from vlv.miniature.world import Scene, SceneObject

APPLE, DOG = SceneObject("apple", "large", "top left"), SceneObject("dog", "small", "bottom right")
CAT = SceneObject("cat", "small", "bottom left")
SCENE = Scene("pink", (APPLE, CAT, DOG))


@pytest.mark.parametrize(
    ("caption", "score"),
    [
        (SCENE, 6),
        (Scene("pink", (APPLE, DOG)), 5),
        (Scene(None, (APPLE, DOG)), 4),
        (Scene(None, (APPLE,)), 3),
        (Scene(None, ()), 3),
        (Scene("white", (APPLE, CAT, DOG)), 2),
        (Scene("white", (APPLE,)), 1),
        (Scene("white", (SceneObject("apple", "large", "top right"), DOG)), 0),
        (Scene("white", ()), 0),
    ],
)
def test_captions_are_scored_by_the_scale_of_the_judge(caption, score):
    assert score_caption(caption, SCENE) == score


def test_content_is_scored_by_its_share():
    assert score_content(SCENE, SCENE) == 6 and score_content(SCENE, Scene("white", (DOG,))) == 2
    assert score_content(SCENE, Scene("white", ())) == 0


def test_questions_have_the_answers_of_the_scene_and_guesses_without_it():
    answers = {question: answer_question(question, SCENE) for question in ask_about(SCENE)}
    assert answers == {
        "What colour is the background?": "pink",
        "How many objects are there?": "3",
        "What is at the top left?": "apple",
        "What is at the bottom left?": "cat",
        "What is at the bottom right?": "dog",
    }
    empty = Scene(None, ())
    assert [answer_question(question, empty) for question in answers] == ["white", "2", "apple", "apple", "apple"]


@pytest.mark.parametrize("length", ["-1", "50000001", "many"])
def test_a_request_of_a_wrong_length_is_refused_and_not_awaited(length):
    with serve_scenes(MINIATURE) as address:
        connection = HTTPConnection(urlsplit(address).netloc, timeout=5)
        connection.putrequest("POST", "/v1/chat/completions")
        connection.putheader("Content-Length", length)
        connection.endheaders()
        response = connection.getresponse()
        assert response.status == 400 and length in json.loads(response.read())["error"]["message"]
        connection.close()


@pytest.mark.slow
def test_judges_and_questions_run_over_http_and_the_truth_has_full_marks(tmp_path, capsys):
    write_pairs(tmp_path / "scenes", 4, "test", 5)
    write_questions(tmp_path / "scenes")
    true = json.loads((tmp_path / "scenes" / "true_captions.json").read_text())
    wrong = {name: write_caption(Scene("pink", (APPLE,))) for name in true}
    (tmp_path / "wrong.json").write_text(json.dumps(wrong))
    files = {name: str(tmp_path / "scenes" / f"{name}.json") for name in ("questions", "annotations")}
    truth = ["--captions", str(tmp_path / "scenes" / "true_captions.json")]
    with serve_scenes(MINIATURE) as address:
        model = ["--base_url", address, "--endpoint_model", MODEL, "--max_retries", "0"]
        judge = ["evaluate", "judge", "--images", str(tmp_path / "scenes"), *truth, *model]
        assert main([*judge, "--output_dir", str(tmp_path / "judge")]) == 0
        assert "| 4 | 0 | 6.00 | 6.00 to 6.00 |" in capsys.readouterr().out
        against = ["--against", str(tmp_path / "wrong.json"), "--output_dir", str(tmp_path / "against")]
        assert main([*judge, *against]) == 0
        assert "| 4 | 0 | 1.00 | 1.00 to 1.00 | 1.00 |" in capsys.readouterr().out
        questions = [option for name, path in files.items() for option in (f"--{name}", path)]
        support = [option.replace("--", "--support_") for option in [*questions, *truth]]
        vqa = ["evaluate", "vqa", *questions, *truth, *support, *model, "--shots", "0", "2"]
        assert main([*vqa, "--output_dir", str(tmp_path / "vqa")]) == 0
        table = capsys.readouterr().out
    assert "100.00" in table.splitlines()[2] and "0 shots, captions" in table
    figures = json.loads((tmp_path / "vqa" / "results.json").read_text())["metrics"]
    assert figures["2 shots, captions"]["accuracy"]["mean"] == 1 > figures["2 shots, blind"]["accuracy"]["mean"]


@pytest.mark.slow
def test_objects_and_content_are_found_over_http(tmp_path, capsys):
    write_pairs(tmp_path / "scenes", 2, "test", 5)
    images = ["--images", str(tmp_path / "scenes"), "--model", "miniature", "--num_inference_steps", "2"]
    with serve_scenes(MINIATURE) as address:
        spatial = ["--detector", f"{address}#{MODEL}", "--boxes", "2d", "--output_dir", str(tmp_path / "endpoint")]
        assert main(["evaluate", "spatial", *images, *spatial]) == 0
        composition = ["--counts", "24+0", "--judge", f"{address}#{MODEL}", "--output_dir", str(tmp_path / "mixed")]
        assert main(["evaluate", "composition", *images, *composition]) == 0
    detector = SceneDetector(MINIATURE / SCENE_CLASSIFIER_FILE)
    originals, generated = sorted((tmp_path / "scenes").glob("*.png")), sorted((tmp_path / "endpoint").rglob("*.png"))
    detected = [list(detector.detect(files)) for files in (originals, generated)]
    expected, _, _ = spatial_figures(["a", "b"], *detected, samples=0)
    found = figures(tmp_path / "endpoint")
    assert found.keys() == expected.keys() and found["centre"]["value"] > 0
    for key, own in expected.items():
        assert found[key]["value"] == pytest.approx(own["value"], abs=2e-3)  # boxes are in thousandths
    scores = figures(tmp_path / "mixed")
    assert scores["score_first"]["value"] > scores["score_second"]["value"]


def figures(folder: Path) -> dict[str, dict]:
    (found,) = json.loads((folder / "results.json").read_text())["metrics"].values()
    return found
