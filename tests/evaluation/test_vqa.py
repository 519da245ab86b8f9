"""Questions answered from captions."""

import json
import re

import pytest

from vlv.evaluation.protocols import VQAConfig, run_vqa
from vlv.evaluation.vqa import (
    VQAItem,
    exact_match,
    image_key,
    normalise_answer,
    read_answer,
    read_vqa,
    soft_accuracy,
    write_prompt,
)

from .openai_server import Reply, scripted_endpoint

COLOURS = ["red", "blue", "green", "red", "white", "black"]


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The Dog.", "dog"),
        ("two dogs", "2 dogs"),
        ("a  cat,  an owl", "cat owl"),
        ("none", "0"),
        ("ten", "10"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("yes!", "yes"),
        ("t-shirt", "t shirt"),
        ("\tright\nside ", "right side"),
    ],
)
def test_answers_are_normalised_as_the_official_evaluation_does(text, normalised):
    assert normalise_answer(text) == normalised


def test_accuracy_is_the_mean_over_annotators_left_out():
    answers = ["yes"] * 3 + ["no"] * 7
    assert soft_accuracy("Yes.", answers) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert soft_accuracy("no", answers) == 1
    assert soft_accuracy("maybe", answers) == 0
    assert soft_accuracy("blue", ["blue", *["red"] * 9]) == pytest.approx(9 * (1 / 3) / 10)
    assert (exact_match("No", answers), exact_match("yes", answers)) == (1, 0)
    with pytest.raises(ValueError, match="answers of annotators"):
        soft_accuracy("a", [])


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("COCO_val2014_000000262148.jpg", "262148"),
        ("262148", "262148"),
        ("val/000000000042.jpg", "42"),
        ("cat.png", "cat"),
    ],
)
def test_an_image_is_found_by_its_number(name, key):
    assert image_key(name) == key


@pytest.mark.parametrize(
    ("text", "answer"),
    [("dog$", "dog"), ("Short answer: two dogs $ and more", "two dogs"), ("dog\nbecause", "dog"), ("", "")],
)
def test_an_answer_is_what_stands_before_the_end_sign(text, answer):
    assert read_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"), [("B", "a red car"), ("(b).", "a red car"), ("A Red Car$", "a red car"), ("D", "D")]
)
def test_a_choice_is_named_by_words_or_letter(text, answer):
    assert read_answer(text, ["a dog", "a red car", "none"]) == answer


@pytest.fixture
def files(tmp_path):
    """Questions about the colour of six images, and captions of five of them, in VQA v2's form."""
    questions = [
        {"question_id": 10 + n, "image_id": n, "question": f"What colour is car {n}?"} for n in range(len(COLOURS))
    ]
    annotations = [{"question_id": 10 + n, "answers": [{"answer": colour}] * 10} for n, colour in enumerate(COLOURS)]
    (tmp_path / "questions.json").write_text(json.dumps({"questions": questions}))
    (tmp_path / "annotations.json").write_text(json.dumps({"annotations": annotations}))
    captions = {f"COCO_{n:06}.jpg": f"a {colour} car" for n, colour in enumerate(COLOURS[:5])}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    return tmp_path


def read_from_context(words: str, before: int) -> Reply:
    """Answers from the caption before the last question; without one, red."""
    context = re.findall(r"Image context: a (\w+) car\nImage question: [^\n]*\nShort answer:$", words)
    return Reply(f"{context[0] if context else 'red'}$")


def config(files, url, **settings) -> VQAConfig:
    paths = {name: str(files / f"{name}.json") for name in ("questions", "annotations", "captions")}
    support = {f"support_{name}": path for name, path in paths.items()}
    return VQAConfig(
        output_dir=str(files / "run"), endpoint_model="reader", base_url=url, **(paths | support | settings)
    )


def test_captions_answer_what_blind_guesses_do_not(files):
    with scripted_endpoint(read_from_context) as script:
        table = run_vqa(config(files, script.url, shots=[0, 2], benchmark="vqav2"))
    assert "| 0 shots, captions | 5 | 0 | 1 | 100.00 | 100.00 to 100.00 | 100.00 | 58.55 |" in table
    assert "| 2 shots, captions | 5 | 0 | 1 | 100.00 | 100.00 to 100.00 | 100.00 |  |" in table
    assert re.search(r"\| 0 shots, blind \| 6 \| 0 \| 0 \| 33.33 \|", table)
    two = [own["messages"][0]["content"] for own in script.requests if own["messages"][0]["content"].count("$\n") == 2]
    assert len({text.split("\n\n")[1] for text in two}) > 1  # examples differ between questions


def test_prompts_have_solved_examples_and_end_where_the_answer_stands():
    item = VQAItem("1", "1", "What?", ("dog",))
    text = write_prompt(item, "a dog", [(VQAItem("2", "2", "Who?", ("cat", "cat", "owl")), "a cat")])
    assert "Image context: a cat\nImage question: Who?\nShort answer: cat$" in text
    assert text.endswith("Image context: a dog\nImage question: What?\nShort answer:")
    assert write_prompt(item, "a dog", []).count("Image context: \n") == 2
    assert "context" not in write_prompt(item, None, [], blind=True).lower()


def test_questions_with_choices_are_read(tmp_path):
    path = tmp_path / "choices.json"
    row = {"image": "7.png", "question": "What is it?", "choices": ["a dog", "a cat"]}
    path.write_text(json.dumps([row | {"answer": own} for own in ("a cat", 1, "B")]))
    assert [own.answers for own in read_vqa(path)] == [("a cat",)] * 3
    path.write_text(json.dumps([row | {"answer": "a bird"}]))
    with pytest.raises(ValueError, match=r"choices.json, question 0: .*a bird.*expected a list"):
        read_vqa(path)


def test_files_of_another_form_and_shots_without_support_are_errors(files):
    with pytest.raises(ValueError, match=r"captions.json and .*annotations.json are not of one set"):
        read_vqa(files / "captions.json", files / "annotations.json")
    with pytest.raises(ValueError, match=r"shots \[4\] need support_questions"):
        VQAConfig("run", "reader", questions="q.json", shots=[4])
    with scripted_endpoint(read_from_context) as script, pytest.raises(ValueError, match="9 shots need as many"):
        run_vqa(config(files, script.url, shots=[9]))
