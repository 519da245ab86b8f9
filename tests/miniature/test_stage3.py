"""Stage 3 of the miniature: captions that are right or wrong get better from images alone."""

import json
from pathlib import Path

import pytest
import torch

from vlv import hub
from vlv.checkpoints import MINIATURE
from vlv.miniature.data import evaluation_items
from vlv.miniature.evaluation import caption_images
from vlv.miniature.sampled_image_score import SampledImageScorer
from vlv.miniature.score_ranking import load_scorer
from vlv.miniature.scoring import count_mentions
from vlv.miniature.stage3 import main as command
from vlv.miniature.stage3 import measure, measure_kept, new_scenes, render_scene, table, write_images
from vlv.miniature.world import Scene, SceneObject
from vlv.train import Stage3Trainer, stage3
from vlv.train.rounds import RoundFile


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """The embedded captioner, whose language projection has noise, so that its captions have errors."""
    model, processor = hub.load_captioner(MINIATURE)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in (parameter for parameter in model.language_projection.parameters() if parameter.ndim == 2):
            weight += 1.1 * weight.std() * torch.randn_like(weight)
    decoder = hub.find_diffusion_model(str(MINIATURE))
    return hub.export(tmp_path_factory.mktemp("start"), captioner=model, processor=processor, diffusion_model=decoder)


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> tuple[Path, list[Scene]]:
    """A folder of 32 images, and their scenes."""
    folder = tmp_path_factory.mktemp("images")
    return folder, write_images(folder, 32, "combo", 41, evaluation_items("combo", 32)[1])


@pytest.fixture(scope="module")
def train(start, seen, tmp_path_factory):
    """Trains the projection on the images, with 6 samples of each and 2 passes of the denoiser a caption."""
    cache = tmp_path_factory.mktemp("cache")

    def train(folder: Path, **own) -> Stage3Trainer:
        settings = {
            "model": start,
            "images": seen[0],
            "output_dir": folder,
            "trainable": "projector",
            "round_images": 32,
            "num_captions": 6,
            "sample_batch_size": 32,
            "reward_num_pairs": 2,
            "max_caption_tokens": 64,
            "per_device_train_batch_size": 16,
            "cache_conditioning": cache / "conditioning",
            "conditioning_dtype": "float32",
            "cache_rewards": cache,
            "dataloader_num_workers": 0,
            "use_cpu": True,
            "disable_tqdm": True,
            **own,
        }
        return stage3.main([f"--{name}={value}" for name, value in settings.items()])

    return train


def summary(folder: Path, number: int) -> dict[str, float]:
    return json.loads((folder / "rounds" / f"round-{number:04d}.json").read_text())


@pytest.mark.slow
def test_a_captioner_with_errors_gets_better_rewards_and_truer_captions(start, seen, train, tmp_path):
    model, processor = hub.load_captioner(start)
    pixels, truth = evaluation_items("combo", 32)
    trainer = train(
        tmp_path, rounds=1, round_steps=24, learning_rate=1e-3, validation_steps=24, num_validation_images=32
    )
    before, after = (measure(caption_images(own, processor, pixels), truth) for own in (model, trainer.model))
    images = torch.stack([render_scene(place, "combo", 41) for place, _ in new_scenes(32, "combo", 41, truth)])
    greedy = measure(caption_images(model, processor, images), seen[1])
    kept = measure_kept(tmp_path, 0, seen[1])
    assert kept["exact"] > greedy["exact"] and kept["object_place_f1"] > greedy["object_place_f1"]
    for name in ("object_place_f1", "object_size_place_f1", "exact"):
        assert after[name] > before[name], (before, after)
    assert after["invented"] < before["invented"] and after["missing"] < before["missing"]
    found = summary(tmp_path, 0)
    (sample,) = (tmp_path / "samples").iterdir()
    rewards = [row["reward"] for row in json.loads(sample.read_text())]  # of the images of the round, all of them
    assert len(rewards) == found["images"]
    rewards = [reward for reward in rewards if reward is not None]
    assert found["reward_best"] > found["reward_greedy"] > found["reward_sampled"]
    assert sum(rewards) / len(rewards) > found["reward_greedy"]


@pytest.mark.slow
def test_a_policy_gradient_raises_the_reward_and_the_truth_of_the_samples(seen, train, tmp_path):
    """Two rounds of the same images: in the second, the samples are of the model that the first has trained."""
    train(
        tmp_path,
        **{"method": "grpo", "kl_weight": 0, "rounds": 2, "round_steps": 8, "num_captions": 4},
        **{"learning_rate": 1e-3, "validation_steps": 0},
    )
    first, second = (summary(tmp_path, number) for number in range(2))
    assert second["reward_sampled"] > first["reward_sampled"] + 0.03
    truth = []
    for number in range(2):
        images = list(RoundFile(tmp_path / "rounds", number, None, None).images())
        samples = [(caption, seen[1][image.index]) for image in images for caption in image.captions[1:]]
        truth.append(measure(*zip(*samples, strict=True)))
    for name in ("object_place_f1", "exact"):
        assert truth[1][name] > truth[0][name] + 0.04, truth


def test_scenes_that_are_measured_are_not_trained_on():
    _, held_out = evaluation_items("combo", 20)
    found = [scene for _, scene in new_scenes(20, "combo", 23, held_out)]  # the seed of the evaluation
    assert not {scene.text for scene in held_out} & {scene.text for scene in found}
    assert {scene.split() for scene in found} == {"combo"}


def test_invented_and_missing_mentions_are_shares_of_what_is_mentioned_and_present():
    dog, cat, car = (SceneObject(name, "large", "top left") for name in ("dog", "cat", "car"))
    true = [Scene("white", (dog, cat)), Scene("pink", (car,))]
    assert count_mentions(true, true) == {"invented": 0, "missing": 0}
    captions = [Scene("white", (dog, car)), Scene(None, ())]  # a car for the cat; nothing at all
    assert count_mentions(captions, true) == {"invented": round(1 / 3, 4), "missing": round(3 / 5, 4)}
    assert count_mentions([Scene(None, ())], true[:1]) == {"invented": 0, "missing": 1}


def test_a_table_has_a_row_for_each_round_that_has_the_scores():
    scores = measure(["a large dog at the top left, on a white background"] * 2, [Scene("white", ())] * 2)
    printed = table({"rounds": [{"round": 0, "combo": scores}, {"round": 1, "combo": scores, "kept": scores}]}, "kept")
    assert printed.splitlines()[2:] == ["| 1 | 0.000 | 0.000 | 1.000 | 0.500 | 0.000 | 11.0 |"]


@pytest.mark.slow
def test_an_image_sampled_from_the_true_caption_is_closer_to_the_original():
    _, scorer = load_scorer(MINIATURE)
    sampled = SampledImageScorer(scorer.model, scorer.diffusion_decoder, scorer.tokenizers, steps=4)
    pixels, scenes = evaluation_items("combo", 1)
    names = [(o.size, o.name, o.place) for o in scenes[0].objects]
    true = ", ".join(f"a {size} {name} at the {place}" for size, name, place in names)
    caption = f"{true}, on a {scenes[0].background} background"
    other = next(colour for colour in ("dark blue", "yellow") if colour != scenes[0].background)
    scores = sampled.score(pixels, [[caption, f"{true}, on a {other} background"]]).scores[0]
    assert scores[0] > scores[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--round_steps=4"], "--round_steps is set by this command"),
        (["--bf16", "true"], "--name=value"),
        (["--start", "nowhere"], "there is no config.json"),
    ],
)
def test_options_that_cannot_be_passed_on_are_refused_before_anything_is_trained(tmp_path, capsys, given, message):
    with pytest.raises(SystemExit):
        command(["runs", *given] if given[0] != "--bf16" else [*given, "runs"])
    assert message in capsys.readouterr().err
