"""Questions about scenes with their answers, in the files of VQA v2: `python -m vlv.miniature.scene_questions FOLDER`.

FOLDER is what `python -m vlv.miniature.pairs` wrote. Its captions state exactly what the scenes contain.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlv.files import write_json

from .grammar import parse_caption
from .pairs import LIST_FILE
from .world import OBJECTS, PLACES, Scene

QUESTIONS_FILE, ANNOTATIONS_FILE, CAPTIONS_FILE = "questions.json", "annotations.json", "true_captions.json"
ANNOTATORS = 10  # of an answer of VQA v2
BACKGROUND, NUMBER, PLACE = "What colour is the background?", "How many objects are there?", "What is at the {place}?"
GUESSES = {BACKGROUND: "white", NUMBER: "2"}  # without a caption
_AT_PLACE = re.compile(PLACE.format(place=f"({'|'.join(PLACES)})").replace("?", r"\?"))


def answer_question(question: str, scene: Scene) -> str:
    """The answer for a scene; a guess if the scene does not say. An empty scene stands for no caption."""
    is_empty = scene.background is None and not scene.objects
    if question == BACKGROUND:
        return scene.background or GUESSES[BACKGROUND]
    if question == NUMBER:
        return GUESSES[NUMBER] if is_empty else str(len(scene.objects))
    found = _AT_PLACE.fullmatch(question)
    names = [o.name for o in scene.objects if found and o.place == found[1]]
    return names[0] if names else OBJECTS[0]


def ask_about(scene: Scene) -> list[str]:
    """The questions about a scene."""
    return [BACKGROUND, NUMBER, *(PLACE.format(place=o.place) for o in scene.objects)]


def write_questions(folder: str | Path) -> None:
    """Writes questions, annotations and the true captions of a folder of pairs into it.

    Raises:
        OSError: If it has no list of pairs.
    """
    root = Path(folder)
    pairs = [json.loads(line) for line in (root / LIST_FILE).read_text(encoding="utf-8").splitlines()]
    questions: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for pair in pairs:
        scene = parse_caption(pair["caption"])
        for question in ask_about(scene):
            number = len(questions)
            questions.append({"question_id": number, "image_id": pair["image"], "question": question})
            answers = [{"answer": answer_question(question, scene)}] * ANNOTATORS
            annotations.append({"question_id": number, "answers": answers})
    write_json(root / QUESTIONS_FILE, {"questions": questions})
    write_json(root / ANNOTATIONS_FILE, {"annotations": annotations})
    write_json(root / CAPTIONS_FILE, {pair["image"]: pair["caption"] for pair in pairs})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vlv.miniature.scene_questions", description=__doc__)
    parser.add_argument("folder")
    write_questions(parser.parse_args(arguments).folder)


if __name__ == "__main__":
    main()
