"""Captions that please the frozen denoiser and are not true: `python -m vlv.miniature.reward_hacking`.

True captions of scenes are changed in ways that a reward could favour. The table says how often the score of a
changed caption is above that of the true one, how fluent it is, and how often it is above with what stage 3 has
against it: a floor of fluency, here the lowest of the true captions less a margin, and a penalty for each word. The
last row appends, one after the other, the words of the vocabulary that raise the score most, whatever they say.
"""

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean

import torch

from vlv import hub
from vlv.evaluation import markdown_table
from vlv.pipelines import DiffusionScorer
from vlv.train.fluency import measure_fluency

from .data import evaluation_items
from .evaluation import MAX_NEW_TOKENS
from .grammar import write_caption
from .scene_changes import invent_object
from .score_ranking import load_scorer, score_in_batches
from .tokenizer import vocabulary
from .world import Scene

APPENDED = 3  # words
MARGIN = 0.5  # between the lowest fluency of true captions and the floor, in nats a token
HEADER = ("caption", "scenes", "above the true one", "score, less that of the true one", "words", "fluency")


def repeat_object(scene: Scene, rng: random.Random) -> str | None:
    """The true caption with its first object twice; None if that is too long for the text encoder."""
    if len(scene.objects) > 2:
        return None
    return write_caption(replace(scene, objects=(scene.objects[0], *scene.objects)))


def add_object(scene: Scene, rng: random.Random) -> str | None:
    """With an object that is not there; None where the scene has no place for it."""
    other = invent_object(scene, rng)
    return None if other is None else write_caption(other)


def background_alone(scene: Scene, rng: random.Random) -> str:
    """Without the objects."""
    return write_caption(replace(scene, objects=()))


def objects_alone(scene: Scene, rng: random.Random) -> str:
    """Without the background."""
    return write_caption(replace(scene, background=None))


def shuffled_words(scene: Scene, rng: random.Random) -> str:
    """The words of the true caption in any order."""
    words = write_caption(scene).replace(",", "").split()
    rng.shuffle(words)
    return " ".join(words)


def names_alone(scene: Scene, rng: random.Random) -> str:
    """A list of what is there, without places."""
    return " ".join([*(f"{own.size} {own.name}" for own in scene.objects), scene.background or ""])


HACKS: dict[str, Callable[[Scene, random.Random], str | None]] = {
    "an object said twice": repeat_object,
    "an invented object": add_object,
    "the background alone": background_alone,
    "the objects alone": objects_alone,
    "the words in any order": shuffled_words,
    "names without places": names_alone,
}
BY_WORDS = f"with the {APPENDED} words that raise the score most"


def append_words(scorer: DiffusionScorer, image: torch.Tensor, caption: str) -> str:
    """The caption with `APPENDED` further words of the vocabulary, each with the highest score.

    Args:
        image: `(3, 64, 64)` uint8.
    """
    words = [word for word in vocabulary() if word.isalpha()]
    for _ in range(APPENDED):
        longer = [f"{caption} {word}" for word in words]
        caption = longer[int(scorer.score(image[None], [longer]).scores[0].argmax())]
    return caption


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vlv.miniature.reward_hacking", description=__doc__)
    parser.add_argument("model", help="folder of a miniature, whose denoiser gives the scores")
    parser.add_argument(
        "--captioner", help="whose language model says how fluent a caption is (default: of the model)"
    )
    parser.add_argument("--scenes", type=int, default=100, help="of combo (default: %(default)s)")
    parser.add_argument("--fewer-scenes", type=int, default=20, help="of the last row (default: %(default)s)")
    parser.add_argument("--num-pairs", type=int, default=4, metavar="K", help="of a score (default: %(default)s)")
    parser.add_argument("--length-penalty", type=float, default=0.003, help="for each word (default: %(default)s)")
    options = parser.parse_args(arguments)
    _, scorer = load_scorer(options.model, num_pairs=options.num_pairs)
    captioner, processor = hub.load_captioner(options.captioner or options.model)
    images, scenes = evaluation_items("combo", options.scenes)
    true = [write_caption(scene) for scene in scenes]
    true_scores = score_in_batches(scorer, images, [[caption] for caption in true])[:, 0].tolist()

    def fluency(captions: Sequence[str]) -> list[float]:
        return measure_fluency(captioner, processor, captions, MAX_NEW_TOKENS, True, 64)

    of_true = fluency(true)
    floor = min(of_true) - MARGIN
    words = fmean(len(caption.split()) for caption in true)
    rows = [["the true one", str(len(true)), "", "", f"{words:.1f}", f"{fmean(of_true):.2f}", "", ""]]
    changed: dict[str, list[tuple[int, str]]] = {}
    for name, hack in HACKS.items():
        made = ((place, hack(scene, random.Random(f"{name}/{place}"))) for place, scene in enumerate(scenes))
        changed[name] = [(place, caption) for place, caption in made if caption is not None]
    few = range(min(options.fewer_scenes, len(scenes)))
    changed[BY_WORDS] = [(place, append_words(scorer, images[place], true[place])) for place in few]
    for name, own in changed.items():
        if not own:
            continue
        places, captions = [place for place, _ in own], [caption for _, caption in own]
        scores = score_in_batches(scorer, images[places], [[caption] for caption in captions])[:, 0].tolist()
        gains = [score - true_scores[place] for place, score in zip(places, scores, strict=True)]
        fluent = fluency(captions)
        above = [gain > 0 for gain in gains]
        kept = [own and value >= floor for own, value in zip(above, fluent, strict=True)]
        longer = [len(caption.split()) - len(true[place].split()) for place, caption in own]
        still = [gain > options.length_penalty * more for gain, more in zip(gains, longer, strict=True)]
        length = fmean(len(caption.split()) for caption in captions)
        figures = f"{fmean(above):.2f}", f"{fmean(gains):+.3f}", f"{length:.1f}", f"{fmean(fluent):.2f}"
        rows.append([name, str(len(own)), *figures, f"{fmean(kept):.2f}", f"{fmean(still):.2f}"])
    held = f"above, with a fluency of {floor:.2f}", f"above, less {options.length_penalty:g} for each word"
    print(markdown_table((*HEADER, *held), rows))
    print("\n".join(["", *(f"- {caption}" for _, caption in changed[BY_WORDS][:3])]))


if __name__ == "__main__":
    main()
