"""A judge of captions: unruly answers, both orders, agreement."""

import json
import re

import pytest
from PIL import Image

from vlv.evaluation.judge import parse_comparison, parse_score, weighted_kappa
from vlv.evaluation.protocols import JudgeConfig, describe_agreement, run_judge

from .openai_server import Reply, scripted_endpoint


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("It covers all.\nScore: 5", 5),
        ("**Score:** 4/6", 4),
        ("Score: **3**", 3),
        ("The score is 2.", 2),
        ("I would give it 4 out of 6", 4),
        ("6", 6),
        ("Nearly perfect.\n5/6", 5),
        ('```json\n{"reason": "ok", "score": 1}\n```', 1),
        ('{"Score": "0"}', 0),
        ("On a scale from 0 to 6, score: 0-6, this gets\nScore: 3", 3),
        ("Score: 2. On reflection, better.\nScore: 4", 4),
        ("Score: 7", None),
        ("Score: -1", None),
        ("Score: 4.5", None),
        ("I cannot judge this image.", None),
        ("There are 3 dogs and 4 cats.", None),
        ("Score: 5/10", None),
        ("Score: 5 out of 10", None),
        ("Score: 4.5 to 5", None),
        ("Score: 4,5", None),
        ("Score: 10-16", None),
        ("Score: 3 or 4", None),
        ("Score: 5%", None),
        ("Score: 5/10th", None),
        ("Score: 4 of 6 points, a 4/6", 4),
        ("Score: 2. All in all, score: 4 to 5", None),
        ("Score: 4/6 (scores go from 0 to 6)", 4),
        ("Score: 4 (score 0-6)", 4),
        ("The picture is of 3/6/2024.", None),
        ("Misses much.\n-1", None),
        ("A score of 6 would need the dog too, so I give 4 out of 6.", 4),
        ('Example {"score": 2}.\nScore: 5', 5),
        ('Score: 5, or as JSON {"score": 2}', 2),
        ('{"score": 4, "reason": "a score of 6 would need the dog"}', 4),
        ('{"score": {"value": 2}}', None),
        ('{"score": 4, "parts": {"layout": 5}}', 4),
    ],
)
def test_scores_are_read_from_unruly_answers(text, score):
    assert parse_score(text) == score


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("The first misses a dog.\nBetter: 2", 2),
        ("**Better:** Caption 1", 1),
        ("Better: equal", 0),
        ("The better one is caption 2", 2),
        ('{"better": 1}', 1),
        ('{"better": "equal"}', 0),
        ("Both are fine.\n2", 2),
        ("Winner: first", 1),
        ("It is a tie.\nBetter: tie", 0),
        ("Caption 1 has 2 dogs.", None),
        ('{"better": "Caption 2 (more detail)"}', 2),
        ('{"better": 2.0}', 2),
        ('{"better": "B"}', None),
        ('{"better": "1 is worse than 2"}', None),
        ('{"better": null}', None),
        ('Example {"better": 2}.\nBetter: 1', 1),
        ("Caption 1 is better. Both mention the dog.", None),
        ("Which is better? Both mention the dog.", None),
        ("The better one is hard to say", None),
        ("Better: caption one", 1),
        ("Better: the second", 2),
        ("Better: neither", 0),
        ("Better: 1 or 2", None),
        ("Better: 1\nNo.\n2", 2),
        ("", None),
    ],
)
def test_comparisons_are_read_from_unruly_answers(text, choice):
    assert parse_comparison(text) == choice


@pytest.fixture
def files(tmp_path):
    """A folder of images and two files of captions; the second's are longer."""
    images = tmp_path / "images"
    images.mkdir()
    for name in "abc":
        Image.new("RGB", (8, 8)).save(images / f"{name}.png")
    for name, words in (("first", "a dog"), ("second", "a dog on a red mat")):
        captions = {f"{image}.png": f"{words} {image}" for image in "abc"}
        (tmp_path / f"{name}.json").write_text(json.dumps(captions))
    return tmp_path


def config(folder, url, output="run", **settings) -> JudgeConfig:
    return JudgeConfig(
        output_dir=str(folder / output),
        endpoint_model="judge",
        base_url=url,
        images=str(folder / "images"),
        captions=str(folder / "first.json"),
        **settings,
    )


def test_scores_are_averaged_and_captions_without_one_are_named(files):
    def answer(words: str, before: int) -> Reply:
        image = re.search(r"a dog (\w)", words).group(1)
        return Reply({"a": "Score: 6", "b": "Score: 3", "c": "I refuse."}[image])

    with scripted_endpoint(answer) as script:
        table = run_judge(config(files, script.url))
        beside = run_judge(config(files, script.url, paper="table2/vlv"))
        image = script.requests[0]["messages"][0]["content"][0]["image_url"]["url"]
    assert image.startswith("data:image/png;base64,")
    assert "| 2 | 1 | 4.50 | 3.00 to 6.00 |\n" in f"{table}\n" and "paper" not in table
    assert "| score, 0 to 6 of the paper's VLV (Table 2, mean of two judges) |" in beside.splitlines()[0]
    assert "| 2 | 1 | 4.50 | 3.00 to 6.00 | 5.18 |" in beside
    results = json.loads((files / "run" / "results.json").read_text())
    assert results["metrics"]["verdicts"] == {"a.png": 6, "b.png": 3}
    assert results["metrics"]["failed"]["c.png"] == "the answer gives no score from 0 to 6: 'I refuse.'"


@pytest.mark.parametrize(
    ("judge", "share", "agree"),
    [
        (lambda first, second: "Better: 1", "0.50", "0.00"),  # the position alone
        (lambda first, second: f"Better: {1 if len(first) > len(second) else 2}", "0.00", "1.00"),  # the longer one
        (lambda first, second: "Better: equal", "0.50", "1.00"),
    ],
    ids=["position", "length", "ties"],
)
def test_captions_are_compared_in_both_orders(files, judge, share, agree):
    def answer(words: str, before: int) -> Reply:
        return Reply(judge(*re.search(r"Caption 1:\n(.*)\n\nCaption 2:\n(.*)\n", words).groups()))

    with scripted_endpoint(answer) as script:
        table = run_judge(config(files, script.url, against=str(files / "second.json")))
        assert len(script.requests) == 6
    assert f"| 3 | 0 | {share} |" in table and table.endswith(f"| {agree} |")


@pytest.mark.slow
def test_two_judges_are_compared_by_their_results(files):
    for name, scores in (("one", "665"), ("two", "664")):
        replies = dict(zip("abc", scores, strict=True))
        answer = lambda words, before, replies=replies: Reply(replies[re.search(r"a dog (\w)", words).group(1)])  # noqa: E731
        with scripted_endpoint(answer) as script:
            run_judge(config(files, script.url, name))
        with scripted_endpoint(lambda words, before: Reply("Better: 1")) as script:
            run_judge(config(files, script.url, f"{name}-against", against=str(files / "second.json")))
    one, two, compared = (files / name / "results.json" for name in ("one", "two", "one-against"))
    line = describe_agreement(one, two)
    assert line.startswith("3 captions: weighted kappa 0.") and line.endswith("equal scores 67%")
    with pytest.raises(ValueError, match=r"one-against.results\.json compares captions with .*second\.json"):
        describe_agreement(one, compared)
    with pytest.raises(ValueError, match=r"first\.json is not a results\.json of vlv evaluate judge"):
        describe_agreement(one, files / "first.json")


def test_agreement_beyond_chance():
    assert weighted_kappa([0, 6, 3], [0, 6, 3]) == 1
    assert weighted_kappa([0, 6], [6, 0]) == -1
    assert weighted_kappa([0, 0, 6, 6], [0, 6, 0, 6]) == 0
    # By hand: disagreement 2 * (1/6)^2 / 4; by chance each score meets each other one: 8 * (1/6)^2 / 16.
    assert weighted_kappa([1, 1, 2, 2], [1, 2, 1, 2]) == pytest.approx(1 - (2 / 4) / (8 / 16))


def test_a_plan_asks_nothing(files):
    with scripted_endpoint(lambda words, before: Reply("6")) as script:
        plan = run_judge(config(files, script.url, dry_run=True))
        assert plan.startswith("3 requests") and "Score: N" in plan and not script.requests


def test_captions_without_images_are_an_error_before_anything_is_asked(files):
    (files / "images" / "b.png").unlink()
    with scripted_endpoint(lambda words, before: Reply("6")) as script:
        with pytest.raises(ValueError, match=r"1 captions have no image in .*images, such as 'b.png'"):
            run_judge(config(files, script.url))
        assert not script.requests
