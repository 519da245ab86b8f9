"""Questions about images, answered by a language model that reads their captions alone.

The protocol is De-Diffusion's (arXiv 2311.00618, appendix B), which the paper uses for its Table 3: the caption stands
in the prompt as the image's context, with 0 or more solved examples before the question. Answers are scored as the
official evaluation of VQA v2 and OK-VQA scores them (https://visualqa.org/evaluation.html), and by exact match.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .endpoint import Endpoint, Question

INSTRUCTION = (
    "Answer the question about an image. You do not see the image; its context describes it. Answer in a few words, "
    "as short as possible, and end the answer with a $ sign."
)
BLIND_INSTRUCTION = (
    "Answer the question about an image that you do not see. Give the most probable answer in a few words, as short "
    "as possible, and end it with a $ sign."
)
# Solved examples of zero-shot prompts, which show the form alone: their context is empty.
PSEUDO_EXAMPLES = (("What is in the image?", "dog"), ("How many people are there?", "2"))
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS.split())}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# Forms whose apostrophes the official evaluation restores where an answer leaves them out.
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _without_apostrophes(form: str) -> set[str]:
    """A contracted form with one or all of its apostrophes left out."""
    positions = [index for index, character in enumerate(form) if character == "'"]
    return {form.replace("'", ""), *(form[:index] + form[index + 1 :] for index in positions)}


_CONTRACTIONS = {bare: form for form in _CONTRACTED.split() for bare in _without_apostrophes(form)}


def normalise_answer(text: str) -> str:
    """An answer in the official evaluation's form: lower case, without punctuation and articles, numbers as digits."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    has_comma_in_number = re.search(r"\d,\d", text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        apart = f"{mark} " in text or f" {mark}" in text or has_comma_in_number
        cleaned = cleaned.replace(mark, "" if apart else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned)
    words = [_NUMBERS.get(word, word) for word in cleaned.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def soft_accuracy(answer: str, references: Sequence[str]) -> float:
    """The official accuracy of one answer, 0 to 1.

    The mean, over the annotators, of min(1, matches among the others / 3). Both sides are normalised, also where all
    annotators agree.

    Raises:
        ValueError: If there are no references.
    """
    if not references:
        raise ValueError("an accuracy needs the answers of annotators")
    given = normalise_answer(answer)
    matches = [normalise_answer(own) == given for own in references]
    if len(matches) == 1:
        return float(matches[0])
    return sum(min(1.0, (sum(matches) - own) / 3) for own in matches) / len(matches)


def exact_match(answer: str, references: Sequence[str]) -> float:
    """Whether the answer is that of the most annotators (normalised)."""
    counts = Counter(normalise_answer(own) for own in references)
    return float(normalise_answer(answer) == counts.most_common(1)[0][0])


@dataclass(frozen=True)
class VQAItem:
    """A question about an image.

    Attributes:
        name: Its id.
        image: Name or id of the image.
        question: The words.
        answers: Of the annotators; one or more.
        choices: The answers to choose from, or none.
    """

    name: str
    image: str
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()


class CaptionIndex:
    """Finds the caption of an image, which data sets and files may call by other names.

    An image is looked up by its name, then by the name without suffix, then without folders and suffix, and at last by
    the number at the end, where one of the two names is a number alone: `COCO_val2014_000000262148.jpg` and the id
    262148 are the same image, `kitchen_1.jpg` and `garden_1.jpg` are not.
    """

    def __init__(self, captions: Mapping[str, str]):
        self._captions = captions
        self._names: list[dict[str, list[str]]] = [{}, {}, {}]  # by the name without suffix, stem, number at the end
        for name in captions:
            for found, key in zip(self._names, _name_keys(name), strict=True):
                if key is not None:
                    found.setdefault(key, []).append(name)

    def find(self, image: str) -> str | None:
        """The caption of an image, or None.

        Raises:
            ValueError: If two captions can be meant; the message names both.
        """
        if image in self._captions:
            return self._captions[image]
        short, stem, number = _name_keys(image)
        numbered = [] if number is None else self._names[2].get(number, [])
        if not stem.isdecimal():
            numbered = [name for name in numbered if _name_keys(name)[1].isdecimal()]
        for names in (self._names[0].get(short, []), self._names[1].get(stem, []), numbered):
            if len(names) > 1:
                raise ValueError(
                    f"the caption of image {image!r} could be that of {names[0]!r} or of {names[1]!r}; name the "
                    "images in the captions as the questions do"
                )
            if names:
                return self._captions[names[0]]
        return None


def _name_keys(name: str) -> tuple[str, str, str | None]:
    """A name without suffix, without folders and suffix, and the number at its end, if it has one."""
    short = Path(name).with_suffix("").as_posix() if Path(name).name else name
    stem = Path(short).name
    number = re.search(r"[0-9]+$", stem)
    return short, stem, None if number is None else str(int(number.group()))


def read_vqa(questions: Path, annotations: Path | None = None) -> list[VQAItem]:
    """The questions of VQA v2 or OK-VQA (a file of questions and one of annotations), or of choices.

    A file of choices is a JSON list of `{"image", "question", "choices", "answer"}`, the answer as one of the choices,
    its index or its letter.

    Raises:
        ValueError: If a file has another form or no questions, or a question no annotation, no answers or the id of
            another; the message names the file.
    """
    data = _read_json(questions)
    items = _read_choices(data, questions) if annotations is None else _read_annotated(data, questions, annotations)
    if not items:
        raise ValueError(f"{questions} has no questions")
    names: set[str] = set()
    for item in items:
        if item.name in names:
            raise ValueError(f"{questions} has two questions of the id {item.name}")
        names.add(item.name)
        if not item.answers:
            raise ValueError(f"{annotations}: question {item.name} has no answers")
    return items


def _read_annotated(data: Any, questions: Path, annotations: Path) -> list[VQAItem]:
    found = _read_json(annotations)
    try:
        references = {
            str(own["question_id"]): tuple(str(answer["answer"]) for answer in own["answers"])
            for own in found["annotations"]
        }
        return [
            VQAItem(
                str(own["question_id"]),
                str(own["image_id"]),
                str(own["question"]),
                references[str(own["question_id"])],
            )
            for own in data["questions"]
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{questions} and {annotations} are not of one set of VQA v2 or OK-VQA: {error!r} is missing; expected "
            "{'questions': [{'question_id', 'image_id', 'question'}]} and {'annotations': [{'question_id', "
            "'answers'}]}"
        ) from error


def _read_choices(data: Any, path: Path) -> list[VQAItem]:
    items = []
    for index, own in enumerate(data if isinstance(data, list) else [None]):
        try:
            choices = tuple(str(choice) for choice in own["choices"])
            answer = own["answer"]
            if isinstance(answer, str) and answer not in choices and len(answer) == 1:
                answer = ord(answer.upper()) - ord("A")
            right = choices[answer] if isinstance(answer, int) else answer
            name = str(own.get("id", index))
            if right not in choices:
                raise KeyError(right)
            items.append(VQAItem(name, str(own["image"]), str(own["question"]), (right,), choices))
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f"{path}, question {index}: {error!r}; expected a list of {{'image', 'question', 'choices', 'answer'}}"
            ) from error
    return items


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def write_prompt(
    item: VQAItem, caption: str | None, examples: Sequence[tuple[VQAItem, str | None]], blind: bool = False
) -> str:
    """The prompt of a question, with solved examples before it; without any, with two that show the form alone."""
    blocks = [BLIND_INSTRUCTION if blind else INSTRUCTION]
    solved = [(own, context, Counter(own.answers).most_common(1)[0][0]) for own, context in examples] or [
        (VQAItem("", "", question, ()), "", answer) for question, answer in PSEUDO_EXAMPLES
    ]
    for own, context, answer in [*solved, (item, caption, None)]:
        lines = [] if blind else [f"Image context: {context or ''}"]
        lines.append(f"Image question: {own.question}")
        if own.choices:
            lines.append("Choices: " + "; ".join(own.choices))
        lines.append("Short answer:" if answer is None else f"Short answer: {answer}$")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def read_answer(text: str, choices: Sequence[str] = ()) -> str:
    """The answer in a model's text: what stands before the $ sign, on one line, without the field's name.

    Of choices, the one that it names, by its words or its letter; else the text.
    """
    text = text.strip().removeprefix("Short answer:").partition("$")[0].strip()
    text = text.splitlines()[0].strip() if text else ""
    if not choices:
        return text
    by_words = [own for own in choices if normalise_answer(own) == normalise_answer(text)]
    letter = re.fullmatch(r"\(?([A-Za-z])\)?[.:]?", text)
    if not by_words and letter and (index := ord(letter.group(1).upper()) - ord("A")) < len(choices):
        return choices[index]
    return by_words[0] if by_words else text


@dataclass(frozen=True)
class VQAResult:
    """Accuracies of the questions that were answered, in the order of the questions.

    Attributes:
        soft, exact: One for each answered question, 0 to 1.
        without_caption: Number of questions left out because their image has no caption.
        failed: Reasons, by name of the question.
    """

    soft: list[float]
    exact: list[float]
    without_caption: int
    failed: dict[str, str]


@dataclass(frozen=True)
class VQAPass:
    """Questions that are asked with one number of shots. [`plan_pass`] builds it.

    Attributes:
        asked: The questions whose image has a caption, each with the caption; None for all without captions.
        examples: Supporting questions that may be drawn, each with its caption or None.
        shots, seed: As in [`plan_pass`].
        blind: Whether prompts have no captions.
        without_caption: Number of questions left out.
    """

    asked: list[tuple[VQAItem, str | None]]
    examples: list[tuple[VQAItem, str | None]]
    shots: int
    seed: int
    blind: bool
    without_caption: int

    def prompts(self) -> Iterator[tuple[VQAItem, str]]:
        """Each question with its prompt."""
        for item, caption in self.asked:
            drawn = random.Random(f"{self.seed}/{item.name}").sample(self.examples, self.shots)
            yield item, write_prompt(item, caption, drawn, self.blind)


def plan_pass(
    items: Sequence[VQAItem],
    captions: Mapping[str, str] | None,
    shots: int = 0,
    support: Sequence[VQAItem] = (),
    support_captions: Mapping[str, str] | None = None,
    seed: int = 0,
) -> VQAPass:
    """Finds the captions of questions and of supporting questions.

    Args:
        captions: By name of the image. None asks without captions: the baseline, which shows how often a question is
            answered right by its words alone.
        shots: Solved examples before each question, drawn from `support` by the seed and the question's name.
        support: Questions with answers, of other images.
        support_captions: Their captions.

    Raises:
        ValueError: If there are fewer supporting questions with captions than shots, no question has a caption, or two
            captions could be that of an image.
    """
    blind = captions is None
    asked, examples = (
        _with_captions(own, None if blind else found or {})
        for own, found in ((items, captions), (support if shots else (), support_captions))
    )
    if len(examples) < shots:
        raise ValueError(f"{shots} shots need as many supporting questions with captions; there are {len(examples)}")
    if not asked:
        raise ValueError("no question is about an image that has a caption; captions are found by the image's name")
    return VQAPass(asked, examples, shots, seed, blind, len(items) - len(asked))


def _with_captions(items: Sequence[VQAItem], captions: Mapping[str, str] | None) -> list[tuple[VQAItem, str | None]]:
    """The questions whose image has a caption, with it; all with None if there are no captions."""
    if captions is None:
        return [(item, None) for item in items]
    index = CaptionIndex(captions)
    found = ((item, index.find(item.image)) for item in items)
    return [(item, caption) for item, caption in found if caption is not None]


def answer_from_captions(
    endpoint: Endpoint, planned: VQAPass, advance: Callable[[int], None] = lambda done: None
) -> VQAResult:
    """Accuracy of a language model that reads captions in place of images.

    Raises:
        EndpointError, PriceReached: As [`Endpoint.ask`].
    """
    prefix = f"{'blind' if planned.blind else 'vqa'}/{planned.shots}"
    questions = (
        Question(f"{prefix}/{item.name}", [{"role": "user", "content": text}]) for item, text in planned.prompts()
    )
    soft, exact, failed = [], [], {}
    for (item, _), answer in zip(planned.asked, endpoint.ask(questions, advance), strict=True):
        if answer.text is None:
            failed[item.name] = str(answer.error)
            continue
        given = read_answer(answer.text, item.choices)
        soft.append(soft_accuracy(given, item.answers))
        exact.append(exact_match(given, item.answers))
    return VQAResult(soft, exact, planned.without_caption, failed)
