"""The diffusion score against the truth: how often it tells a true caption from a false one, and what it costs.

`python -m vlv.miniature.score_ranking MODEL` prints the tables of docs/evaluation.md that are about ranking.
"""

import argparse
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vlv import VLVForConditionalGeneration, VLVProcessor, hub
from vlv.evaluation import markdown_table
from vlv.pipelines import (
    DiffusionScorer,
    ReconstructionPipeline,
    generate_captions,
    generate_images,
    load_reconstruction,
)
from vlv.pipelines.diffusion_score import NUM_PAIRS

from .data import evaluation_items
from .evaluation import MAX_NEW_TOKENS, caption_images
from .folding import fold_empty_positions
from .grammar import parse_caption, write_caption
from .scene_changes import CHANGES, with_wrong_facts
from .scoring import score_scenes
from .world import Scene

PAIRS = (1, 2, 4, 8, 16)
SHARES = tuple(place / 100 for place in range(5, 100, 10))  # of the schedule
MOST_WRONG_FACTS = 3
RECONSTRUCTION_STEPS = 50
BATCH_SIZE = 8  # images at once
TABLES = ("pairs", "timesteps", "facts", "samples", "seconds")


def load_scorer(model: str | Path, **settings) -> tuple[ReconstructionPipeline, DiffusionScorer]:
    """The reconstruction pipeline of a miniature, and a scorer with its parts."""
    pipeline = load_reconstruction(model)
    pipeline.set_progress_bar_config(disable=True)
    transformer = getattr(pipeline, "transformer", None)
    if transformer is not None:
        fold_empty_positions(transformer)
    return pipeline, DiffusionScorer.from_pipeline(pipeline, **settings)


def score_in_batches(scorer: DiffusionScorer, pixels: torch.Tensor, captions: Sequence[Sequence[str]]) -> torch.Tensor:
    """Scores `(N, G)` of `G` captions of each of the images `(N, 3, 64, 64)` uint8."""
    starts = range(0, len(pixels), BATCH_SIZE)
    parts = [scorer.score(pixels[i : i + BATCH_SIZE], captions[i : i + BATCH_SIZE]) for i in starts]
    return torch.cat([part.scores for part in parts])


def captions_with_a_change(scenes: Sequence[Scene]) -> tuple[list[list[str]], torch.Tensor]:
    """The true caption of each scene, and one for each of `CHANGES`, in the same phrasing.

    Returns:
        The captions, and `(N, changes)`, bool: whether the scene allows the change. Where it does not, the true
        caption stands in its place.
    """
    captions, allowed = [], []
    for number, scene in enumerate(scenes):
        rng = random.Random(f"changes/{number}")
        changed = [change(scene, rng) for change in CHANGES.values()]
        captions.append([write_caption(other or scene, random.Random(number)) for other in (scene, *changed)])
        allowed.append([other is not None for other in changed])
    return captions, torch.tensor(allowed)


def measure_ranking(
    scorer: DiffusionScorer, pixels: torch.Tensor, captions: Sequence[Sequence[str]], allowed: torch.Tensor
) -> list[float]:
    """How often the true caption is ranked above one with a change: for each change, and above all of them at once.

    Args:
        pixels: `(N, 3, 64, 64)` uint8.
        captions, allowed: As `captions_with_a_change` gives them.
    """
    scores = score_in_batches(scorer, pixels, captions)
    right = scores[:, :1] > scores[:, 1:]  # (N, changes)
    above_all = (right | ~allowed).all(dim=1).float().mean().item()
    return [right[allowed[:, i], i].float().mean().item() for i in range(allowed.shape[1])] + [above_all]


def measure_agreement(scorer: DiffusionScorer, pixels: torch.Tensor, scenes: Sequence[Scene]) -> list[list[float]]:
    """The mean score of captions by their number of wrong facts, and how often one more wrong fact lowers the score.

    Returns:
        A row for each number of wrong facts, 0 to `MOST_WRONG_FACTS`: the number, the mean score, and the share of
        scenes in which the score is below that with one wrong fact less (NaN for the first).
    """
    counts = range(MOST_WRONG_FACTS + 1)
    captions = [
        [
            write_caption(with_wrong_facts(scene, count, random.Random(f"facts/{number}")), random.Random(number))
            for count in counts
        ]
        for number, scene in enumerate(scenes)
    ]
    scores = score_in_batches(scorer, pixels, captions)  # (N, numbers of wrong facts)
    below = (scores.diff(dim=1) < 0).float().mean(dim=0).tolist()
    return [[count, scores[:, count].mean().item(), [float("nan"), *below][count]] for count in counts]


def measure_best_of(
    scorer: DiffusionScorer,
    captioner: VLVForConditionalGeneration,
    processor: VLVProcessor,
    pixels: torch.Tensor,
    scenes: Sequence[Scene],
    num_captions: int,
    temperature: float,
) -> Iterator[tuple[str, dict[str, float]]]:
    """Scores of greedy captions, of one sample, of the sample with the highest score, and of the best by the truth."""
    sampled: list[list[str]] = []
    for number, image in enumerate(pixels):
        torch.manual_seed(number)
        sampled.append(
            generate_captions(
                captioner,
                processor,
                pixel_values=processor(images=image[None]).pixel_values,
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=True,
                temperature=temperature,
                num_return_sequences=num_captions,
            )
        )
    best = score_in_batches(scorer, pixels, sampled).argmax(dim=1).tolist()
    read = [[parse_caption(caption) for caption in own] for own in sampled]
    greedy = [parse_caption(caption) for caption in caption_images(captioner, processor, pixels)]
    yield "greedy", score_scenes(greedy, scenes)
    yield "one sample", score_scenes([own[0] for own in read], scenes)
    yield f"best of {num_captions} by score", score_scenes([own[i] for own, i in zip(read, best, strict=True)], scenes)
    oracle = [
        max(own, key=lambda s: score_scenes([s], [scene])["object_place_f1"] + (s == scene))
        for own, scene in zip(read, scenes, strict=True)
    ]
    yield f"best of {num_captions} by the truth", score_scenes(oracle, scenes)


def measure_seconds(
    pipeline: ReconstructionPipeline, scorer: DiffusionScorer, pixels: torch.Tensor, captions: Sequence[str]
) -> dict[str, float]:
    """CPU seconds for an image: a score of one caption, and a reconstruction with guidance 2."""
    started = time.process_time()
    scorer.score(pixels, [[caption] for caption in captions])
    scored = time.process_time()
    generate_images(pipeline, image=list(pixels), seeds=range(len(pixels)), num_inference_steps=RECONSTRUCTION_STEPS)
    ended = time.process_time()
    return {"score": (scored - started) / len(pixels), "reconstruction": (ended - scored) / len(pixels)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vlv.miniature.score_ranking", description=__doc__)
    parser.add_argument("model", help="folder of a miniature")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, help="which (default: all)")
    parser.add_argument("--pairs", nargs="+", type=int, default=PAIRS, metavar="K", help="(default: 1 2 4 8 16)")
    parser.add_argument("--scenes", type=int, default=100, help="scenes of combo by number of pairs (default: 100)")
    parser.add_argument("--fewer-scenes", type=int, default=40, help="scenes of the other tables (default: 40)")
    parser.add_argument("--num-captions", type=int, default=8, help="samples of a caption (default: 8)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the samples (default: 1.0)")
    arguments = parser.parse_args()
    pipeline, scorer = load_scorer(arguments.model)
    for table in arguments.tables:
        count = arguments.scenes if table == "pairs" else arguments.fewer_scenes
        pixels, scenes = evaluation_items("combo", count)
        captions, allowed = captions_with_a_change(scenes)
        if table == "pairs":
            settings = {f"{number}": {"num_pairs": number} for number in arguments.pairs}
            print(_ranking_table("K", pipeline, settings, pixels, captions, allowed))
        elif table == "timesteps":
            settings = {f"{share:.2f}": {"num_pairs": 1, "timestep_range": (share, share)} for share in SHARES}
            print(_ranking_table("timestep", pipeline, settings, pixels, captions, allowed))
        elif table == "facts":
            rows = [[f"{row[0]:.0f}", *_three_digits(row[1:])] for row in measure_agreement(scorer, pixels, scenes)]
            print(markdown_table(("wrong facts", "mean score", "below one fewer"), rows))
        elif table == "samples":
            captioner, processor = hub.load_captioner(arguments.model)
            sampling = arguments.num_captions, arguments.temperature
            found = measure_best_of(scorer, captioner, processor, pixels, scenes, *sampling)
            names = ("background", "object_f1", "object_place_f1", "exact")
            rows = [[which, *_three_digits([scores[name] for name in names])] for which, scores in found]
            print(markdown_table(("captions", "background", "object F1", "object + place F1", "exact scene"), rows))
        else:
            true = [own[0] for own in captions[:BATCH_SIZE]]
            seconds = measure_seconds(pipeline, scorer, pixels[:BATCH_SIZE], true)
            ratio = seconds["reconstruction"] / seconds["score"]
            print(
                f"CPU seconds: {seconds['score']:.3f} for the score of a caption (K = {NUM_PAIRS}), "
                f"{seconds['reconstruction']:.3f} for a reconstruction in {RECONSTRUCTION_STEPS} steps with guidance, "
                f"{ratio:.0f} times as long"
            )
        print(flush=True)


def _ranking_table(
    title: str,
    pipeline: ReconstructionPipeline,
    settings: Mapping[str, dict[str, Any]],
    pixels: torch.Tensor,
    captions: Sequence[Sequence[str]],
    allowed: torch.Tensor,
) -> str:
    """The table of `measure_ranking`, with a row for each name of `settings`, arguments of `DiffusionScorer`."""
    rows = []
    for name, own in settings.items():
        scorer = DiffusionScorer.from_pipeline(pipeline, **own)
        rows.append([name, *_three_digits(measure_ranking(scorer, pixels, captions, allowed))])
    return markdown_table((title, *CHANGES, "above all of them"), rows)


def _three_digits(values: Sequence[float]) -> list[str]:
    return ["" if math.isnan(value) else f"{value:.3f}" for value in values]


if __name__ == "__main__":
    main()
