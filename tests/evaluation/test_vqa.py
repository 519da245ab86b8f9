"""Questions answered from captions."""

import json
import re

import pytest

from vlv.evaluation.protocols import VQAConfig, run_vqa
from vlv.evaluation.vqa import (
    CaptionIndex,
    VQAItem,
    exact_match,
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
    ("image", "names"),
    [
        ("262148", ["COCO_val2014_000000262148.jpg", "COCO_val2014_000000262149.jpg"]),
        ("COCO_val2014_000000262148.jpg", ["262148", "COCO_val2014_000000026214.jpg"]),
        ("42", ["val/000000000042.jpg", "val/000000000420.jpg"]),
        ("cat.png", ["cat.jpg", "dog.jpg"]),
        ("test-1.png", ["test-1.png", "combo-1.png"]),
        ("kitchen_1.png", ["kitchen_1.jpg", "garden_1.jpg"]),
        ("train/0001", ["train/0001.jpg", "val/0001.jpg"]),
        ("0001", ["0001", "val/0001.jpg"]),
    ],
)
def test_an_image_is_found_by_its_name_and_then_by_its_number(image, names):
    for order in (names, names[::-1]):
        assert CaptionIndex({name: name for name in order}).find(image) == names[0]


@pytest.mark.parametrize(
    ("image", "other"),
    [("test-1.png", "combo-1.png"), ("kitchen_1", "garden_1.jpg"), ("42", "420.jpg"), ("cat", "dog.png")],
)
def test_another_image_with_the_same_number_has_another_name(image, other):
    assert CaptionIndex({other: "a dog"}).find(image) is None


def test_an_image_whose_name_fits_two_captions_is_an_error():
    for image, names in (("1", ("kitchen_1.jpg", "garden_1.jpg")), ("0001.png", ("train/0001.jpg", "val/0001.jpg"))):
        with pytest.raises(ValueError, match=f"{names[0]}' or of '{names[1]}'"):
            CaptionIndex(dict.fromkeys(names, "a dog")).find(image)


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
        VQAConfig(output_dir="run", endpoint_model="reader", questions="q.json", shots=[4])
    with pytest.raises(ValueError, match=r"shots is \[-1\]; expected one or more numbers"):
        config(files, None, shots=[-1])
    with pytest.raises(ValueError, match="limit is 0; it must be at least 1"):
        config(files, None, limit=0)
    with pytest.raises(ValueError, match="max_price needs price_in"):
        config(files, None, max_price=1.0)


def rewrite(path, key, change) -> None:
    """Changes the list at the key of a JSON file."""
    content = json.loads(path.read_text())
    change(content[key])
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("file", "key", "change", "message"),
    [
        ("questions.json", "questions", list.clear, "questions.json has no questions"),
        (
            "annotations.json",
            "annotations",
            lambda own: own[0]["answers"].clear(),
            "annotations.json: question 10 has no answers",
        ),
        (
            "questions.json",
            "questions",
            lambda own: own.append(own[0]),
            "questions.json has two questions of the id 10",
        ),
        (
            "questions.json",
            "questions",
            lambda own: own.__delitem__(slice(3, None)),
            "4 shots need as many supporting questions with captions; there are 3",
        ),
    ],
    ids=["no questions", "no answers", "twice", "few examples"],
)
def test_what_cannot_be_asked_is_an_error_before_anything_is_asked(files, file, key, change, message, dry_run):
    rewrite(files / file, key, change)
    with scripted_endpoint(read_from_context) as script:
        with pytest.raises(ValueError, match=re.escape(message)):
            run_vqa(config(files, script.url, shots=[0, 4], dry_run=dry_run))
        assert not script.requests and not (files / "run").exists()


def test_supporting_questions_need_answers_and_a_list_of_choices_has_questions(files):
    empty = {"annotations": [{"question_id": 10 + n, "answers": []} for n in range(len(COLOURS))]}
    (files / "empty.json").write_text(json.dumps(empty))
    settings = {"shots": [0, 2], "support_annotations": str(files / "empty.json"), "dry_run": True}
    with pytest.raises(ValueError, match=r"empty.json: question 10 has no answers"):
        run_vqa(config(files, None, **settings))
    (files / "choices.json").write_text("[]")
    with pytest.raises(ValueError, match=r"choices.json has no questions"):
        run_vqa(config(files, None, questions=str(files / "choices.json"), annotations=None, dry_run=True))


def test_a_plan_counts_the_questions_that_would_be_asked(files):
    plan = run_vqa(config(files, None, shots=[0, 2], dry_run=True))
    assert plan.startswith("22 requests") and "Image context: a red car\nImage question: What colour is car 0?" in plan
    assert run_vqa(config(files, None, blind=False, dry_run=True)).startswith("5 requests")
